"""One variant, compiled once and trained as often as there are learning rates and seeds."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import mhc_compile
from experiment.model import Decoder
from experiment.plan import RATES, VARIANTS, ExperimentError, Run
from mhc_compile.inspection.stream_stats.measure import Meter
from mhc_compile.tools.demo.data import load_corpus, stable_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from experiment.plan import Plan
    from mhc_compile.tools.demo.data import Split

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
#: Largest distance of the first loss of a variant from the plain model's, in nats.
SAME = 1e-4


class Batches:
    """Batches as a function of the seed and the step, the same for every variant.

    A batch is ids and targets, int64 [batch, length] each, one byte apart, from the standard
    library's sources.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.corpus = load_corpus()

    def training(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of one step."""
        return self._draw(self.corpus.train, "train", seed, step)

    @cached_property
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Batches from files that are never trained on; the same for all seeds."""
        return [self._draw(self.corpus.validation, "held out", i) for i in range(self.plan.held_out)]

    def _draw(self, split: Split, *key: object) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stable_seed("stability", *key))
        window = split.windows(self.plan.batch, self.plan.length + 1, generator)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def schedule(step: int, peak: float, warm_up: int, steps: int) -> float:
    """Return the rate: a linear rise over `warm_up` steps, then a cosine to a tenth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def build(plan: Plan, seed: int) -> Decoder:
    """Build the model with the initial weights of `seed`."""
    torch.manual_seed(stable_seed("stability", "weights", seed))
    return Decoder(layers=plan.layers, width=plan.width, heads=plan.heads, length=plan.length)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of `mhc_compile.parameter_groups`, for plain too: matrices decay."""
    parameters = list(model.parameters())
    decayed, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


class Subject:
    """A variant of the model under `torch.compile`; `train` sets its parameters for every run."""

    def __init__(self, plan: Plan, variant: str, batches: Batches | None = None) -> None:
        self.plan, self.variant, self.batches = plan, variant, batches or Batches(plan)
        self.model = build(plan, 0)
        plain = set(self.model.state_dict())
        self.meter: Meter | None = None
        mapping = VARIANTS[variant]
        if mapping is None:
            self.compiled: Callable[[Tensor], Tensor] = torch.compile(self.model, backend=plan.inner)
        else:  # nothing else differs between variants
            options = {"mapping": mapping, "inner_backend": plan.inner}
            mhc_compile.attach(self.model, self.batches.held_out[0][0], options=options)
            self.compiled = torch.compile(self.model, backend="mhc", options=options)
            self.meter = Meter(self.model, options=options)
        self._start = {name: t.clone() for name, t in self.model.state_dict().items() if name not in plain}

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy in nats a byte, a scalar."""
        return F.cross_entropy(self.compiled(ids).flatten(0, 1), targets.flatten())

    def validate(self, count: int) -> float:
        """Return the mean loss of `count` batches, with gradients: one compiled graph, not two."""
        return statistics.fmean(self.loss(*batch).item() for batch in self.batches.held_out[:count])

    def train(self, run: Run, show: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Train from the weights of the run's seed until a loss or gradient is not finite.

        Args:
            run: of this variant.
            show: called with the loss of every step.

        Returns:
            The content of the run's file: `loss` and `norm` (global gradient norm; nothing is
            clipped) of every step, `validation` and `gain` as lists of [step, figures], `digest` of
            all losses and final weights, and settings.

        Raises:
            ExperimentError: the first loss is not that of the plain model.
        """
        plan, begin = self.plan, time.perf_counter()
        fresh = build(plan, run.seed)
        ids, targets = self.batches.training(run.seed, 0)
        with torch.no_grad():
            plain = F.cross_entropy(fresh(ids).flatten(0, 1), targets.flatten()).item()
        self.model.load_state_dict({**fresh.state_dict(), **self._start})
        optimizer = torch.optim.AdamW(groups(self.model), lr=0.0, betas=BETAS, fused=True)
        losses: list[float] = []
        norms: list[float] = []
        validation: list[list[float]] = []
        gains: list[list[float]] = []
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, RATES[run.rate], plan.warm_up, plan.steps)
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
            if show is not None:
                show(losses[-1])
            if step + 1 in plan.stops():
                count = plan.held_out if step + 1 == plan.steps else max(1, plan.held_out // 8)
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
            "settings": plan.deciding(),
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

    def gain(self) -> tuple[float, float, float, float]:
        """Measure Amax forward and backward, the largest distance and the largest sum error."""
        if self.meter is None:
            return 1.0, 1.0, 0.0, 0.0
        seen = self.meter.measure((self.batches.held_out[0][0],), {})
        distance = max(site.entering.distance for site in seen.sites)
        error = max(max(site.row_error, site.column_error) for site in seen.sites)
        return seen.amax_forward, seen.amax_backward, distance, error


def _short(value: float) -> float | None:
    """Round to six digits, None if not finite; the digest has all bits."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
