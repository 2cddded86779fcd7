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
from experiment.plan import VARIANTS, ExperimentError, Run
from mhc_compile.inspection.stream_stats.measure import Meter
from mhc_compile.tools.demo.data import load_corpus, stable_seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from experiment.plan import Plan, Variant
    from mhc_compile.tools.demo.data import Split

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
#: Steps between two savings of a run that is not finished.
KEPT = 250
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


def build(plan: Plan, seed: int, *, scalars: bool = False) -> Decoder:
    """Build the model with the initial weights of `seed`."""
    torch.manual_seed(stable_seed("stability", "weights", seed))
    sizes = {"layers": plan.layers, "width": plan.width, "heads": plan.heads, "length": plan.length}
    return Decoder(**sizes, embedding=plan.embedding, weights=plan.weights, scalars=scalars)


def groups(model: nn.Module, variant: Variant) -> list[dict[str, Any]]:
    """Return the groups of `mhc_compile.parameter_groups`, for plain too: matrices decay.

    Where a variant asks for it, bias and scale of hyper-connections have a group of their own.
    """
    gates: set[nn.Parameter] = set()
    if variant.gate_decay:
        gates = {p for c in mhc_compile.connections(model).values() for p in c.parameters() if p.dim() == 1}
    others = [p for p in model.parameters() if p not in gates]
    found = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if gates:
        ordered = [p for p in model.parameters() if p in gates]
        found.append({"params": ordered, "weight_decay": variant.gate_decay})
    return found


class Subject:
    """A variant of the model under `torch.compile`; `train` sets its parameters for every run."""

    def __init__(self, plan: Plan, variant: str, batches: Batches | None = None) -> None:
        self.plan, self.variant, self.batches = plan, VARIANTS[variant], batches or Batches(plan)
        self.model = build(plan, 0, scalars=self.variant.scalars)
        plain = set(self.model.state_dict())
        self.meter: Meter | None = None
        if self.variant.options is None:
            self.compiled: Callable[[Tensor], Tensor] = torch.compile(self.model, backend=plan.inner)
        else:  # nothing else differs between variants
            options = {**self.variant.options, "inner_backend": plan.inner}
            mhc_compile.attach(self.model, self.batches.held_out[0][0], options=options)
            self.compiled = torch.compile(self.model, backend="mhc", options=options)
            self.meter = Meter(self.model, options=options)
        self._start = {name: t.clone() for name, t in self.model.state_dict().items() if name not in plain}
        #: What is trained first, and the number of its steps.
        self._first, self._change = self, round(self.variant.plain_part * plan.steps)
        if self._change:
            self._first = Subject(plan, "plain", self.batches)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy in nats a byte, a scalar."""
        return F.cross_entropy(self.compiled(ids).flatten(0, 1), targets.flatten())

    def validate(self, count: int) -> float:
        """Return the mean loss of `count` batches, with gradients: one compiled graph, not two."""
        return statistics.fmean(self.loss(*batch).item() for batch in self.batches.held_out[:count])

    def train(
        self, run: Run, show: Callable[[float], None] | None = None, *, part: Path | None = None
    ) -> dict[str, Any]:
        """Train from the weights of the run's seed until a loss or gradient is not finite.

        Args:
            run: of this variant.
            show: called with the loss of every step.
            part: file for the run so far, every `KEPT` steps; a run that finds it goes on.

        Returns:
            The content of the run's file: `loss` and `norm` (global gradient norm before it is
            clipped) of every step, `validation` and `gain` as lists of [step, figures], `digest` of
            all losses and final weights, and settings.

        Raises:
            ExperimentError: the first loss is not that of the plain model.
        """
        plan, begin = self.plan, time.perf_counter()
        fresh = build(plan, run.seed, scalars=self.variant.scalars)
        ids, targets = self.batches.training(run.seed, 0)
        with torch.no_grad():
            plain = F.cross_entropy(fresh(ids).flatten(0, 1), targets.flatten()).item()
        deciding = plan.deciding(run.variant)
        compared = {**deciding, "data": self.batches.corpus.digest}
        now = self._first
        now.model.load_state_dict({**fresh.state_dict(), **now._start})
        optimizer = now.optimizer()
        losses: list[float] = []
        norms: list[float] = []
        validation: list[list[float]] = []
        gains: list[list[float]] = []
        if part is not None and part.exists():
            state = torch.load(part, weights_only=True)
            plan.compare(part, state["settings"], compared)
            losses, norms, validation, gains = state["figures"]
            if len(losses) > self._change:
                now, optimizer = self, self.optimizer()
            now.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for step in range(len(losses), plan.steps):
            if step == self._change != 0:
                now, optimizer = self, self._continue(now.model, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step, run.rate)
            loss = now.loss(*self.batches.training(run.seed, step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(now.model.parameters(), plan.clip)
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
                validation.append([step + 1, now.validate(count)])
                gains.append([step + 1, *now.gain()])
            if part is not None and (step + 1) % KEPT == 0:
                state = {"settings": compared, "figures": (losses, norms, validation, gains)}
                state |= {"model": now.model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, part.with_suffix(".tmp"))
                part.with_suffix(".tmp").replace(part)
        optimizer.zero_grad()
        digest = hashlib.sha256(repr((losses, norms, validation)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return {
            "variant": run.variant,
            "rate": run.rate,
            "seed": run.seed,
            "settings": deciding,
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

    def optimizer(self) -> torch.optim.AdamW:
        """Return a new optimizer of the variant's groups."""
        return torch.optim.AdamW(groups(self.model, self.variant), lr=0.0, betas=BETAS, fused=True)

    def _continue(self, plain: nn.Module, before: torch.optim.AdamW) -> torch.optim.AdamW:
        """Go on with the weights of a plain model and the moments of its optimizer.

        Raises:
            ExperimentError: the hyper-connections change the loss.
        """
        self.model.load_state_dict({**plain.state_dict(), **self._start})
        batch = self.batches.held_out[0]
        with torch.no_grad():
            losses = [
                F.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten()).item() for m in (plain, self.model)
            ]
        if not abs(losses[0] - losses[1]) <= SAME:
            raise ExperimentError(f"the plain model's loss is {losses[0]}, and {losses[1]} with hyper-connections")
        optimizer, named = self.optimizer(), dict(self.model.named_parameters())
        for name, parameter in plain.named_parameters():
            optimizer.state[named[name]] = before.state[parameter]
        return optimizer

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
