"""One variant, compiled once and trained as often as there are learning rates and seeds."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import mhc_compile
from experiment.model import Decoder
from experiment.plan import RATES, VARIANTS, ExperimentError, Run
from mhc_compile.inspection.stream_stats.measure import Meter
from mhc_compile.tools.demo.data import stable_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from experiment.data import Batches
    from experiment.plan import Plan

__all__ = ["Subject", "build", "groups", "options", "schedule"]

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
#: How far the first loss of a variant may be from that of the model as it is, in nats.
SAME = 1e-4


def schedule(step: int, peak: float, warm_up: int, steps: int) -> float:
    """Learning rate of `step`: a linear rise over `warm_up` steps, then a cosine down to a tenth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def build(plan: Plan, seed: int) -> Decoder:
    """The model with the initial weights of `seed`."""
    torch.manual_seed(stable_seed("stability", "weights", seed))
    return Decoder(layers=plan.layers, width=plan.width, heads=plan.heads, length=plan.length)


def options(plan: Plan, variant: str) -> dict[str, Any] | None:
    """What the backend "mhc" is given; None for the model as it is. Nothing else differs between variants."""
    mapping = VARIANTS[variant]
    return None if mapping is None else {"mapping": mapping, "inner_backend": plan.inner}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors and scalars do not: the groups of `mhc_compile.parameter_groups`, which the plain model can have as well."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


class Subject:
    """A variant of the model under `torch.compile`.

    Attributes:
        model: what is trained; its parameters are set anew for every run.
        compiled: what is called.
    """

    def __init__(self, plan: Plan, variant: str, batches: Batches) -> None:
        self.plan, self.variant, self.batches = plan, variant, batches
        self.model = build(plan, 0)
        self.options = options(plan, variant)
        self.meter: Meter | None = None
        if self.options is None:
            self.compiled: Callable[[Tensor], Tensor] = torch.compile(self.model, backend=plan.inner)
        else:
            mhc_compile.attach(self.model, batches.held_out[0][0], options=self.options)
            self.compiled = torch.compile(self.model, backend="mhc", options=self.options)
            self.meter = Meter(self.model, options=self.options)
        plain = set(build(plan, 0).state_dict())
        self._start = {name: t.clone() for name, t in self.model.state_dict().items() if name not in plain}

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats a byte, a scalar."""
        return F.cross_entropy(self.compiled(ids).flatten(0, 1), targets.flatten())

    def validate(self, count: int) -> float:
        """Mean loss over the first `count` validation batches. With gradients, for the sake of one compiled graph instead of two."""
        return statistics.fmean(self.loss(*batch).item() for batch in self.batches.held_out[:count])

    def train(self, run: Run, advance: Callable[[int, float], None] | None = None) -> dict[str, Any]:
        """Trains from the initial weights of the run's seed. A loss or gradient that is not finite ends it.

        Args:
            run: of this variant.
            advance: is told the number of steps that are done, and the last loss.

        Returns:
            The content of the run's file: `loss` and `norm` (global gradient norm; nothing is clipped) of every step, `validation` and `gain` as
            lists of [step, figures], `digest` of all losses and final weights, and what they were made with.

        Raises:
            ExperimentError: the first loss is not that of the plain model.
        """
        assert run.variant == self.variant
        begin = time.perf_counter()
        fresh = build(self.plan, run.seed)
        plain = F.cross_entropy(*self._flat(fresh, run)).item()
        self.model.load_state_dict({**fresh.state_dict(), **self._start})
        optimizer = torch.optim.AdamW(groups(self.model), lr=0.0, betas=BETAS, fused=True)
        losses: list[float] = []
        norms: list[float] = []
        validation: list[list[float]] = []
        gains: list[list[float]] = []
        for step in range(self.plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, RATES[run.rate], self.plan.warm_up, self.plan.steps)
            loss = self.loss(*self.batches.training(run.seed, step))
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            losses.append(loss.item())
            norms.append(norm.item())
            if step == 0 and not abs(losses[0] - plain) <= SAME:
                raise ExperimentError(
                    f"{run.name}: the first loss is {losses[0]}, the plain model's is {plain}: the start is another function"
                )
            if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
                break
            optimizer.step()
            optimizer.zero_grad()
            if advance is not None:
                advance(step + 1, losses[-1])
            if step + 1 in self.plan.stops():
                last = step + 1 == self.plan.steps
                count = self.plan.held_out if last else max(1, self.plan.held_out // 8)
                validation.append([step + 1, self.validate(count)])
                gains.append([step + 1, *self.gain()])
        optimizer.zero_grad()
        digest = hashlib.sha256(repr((losses, norms, validation)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return {
            "variant": run.variant,
            "rate": run.rate,
            "seed": run.seed,
            "settings": self.plan.deciding(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "start": _short(abs(losses[0] - plain)),
            "loss": [_short(value) for value in losses],
            "norm": [_short(value) for value in norms],
            "validation": [[step, _short(value)] for step, value in validation],
            "gain": [[step, *map(_short, values)] for step, *values in gains],
            "digest": digest.hexdigest(),
            "data": self.batches.corpus.digest,
            "torch": str(torch.__version__),
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def _flat(self, model: nn.Module, run: Run) -> tuple[Tensor, Tensor]:
        ids, targets = self.batches.training(run.seed, 0)
        with torch.no_grad():
            return model(ids).flatten(0, 1), targets.flatten()

    def gain(self) -> tuple[float, float, float, float]:
        """Amax of the composite H_res over depth, forward and backward, the largest distance of the streams from their mean, and the largest error of
        a row or column sum, on one batch.
        """
        if self.meter is None:
            return 1.0, 1.0, 0.0, 0.0
        seen = self.meter.measure((self.batches.held_out[0][0],), {})
        distance = max(site.entering.distance for site in seen.sites)
        return (
            seen.amax_forward,
            seen.amax_backward,
            distance,
            max(max(s.row_error, s.column_error) for s in seen.sites),
        )


def _short(value: float) -> float | None:
    """Six digits, None if not finite: files stay small and are JSON; what is compared bit for bit is in the digest."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
