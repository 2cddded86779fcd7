"""One of the two contestants: a model, its compiled version, its optimizer, and what they measured."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Side"]

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
#: Steps after the first of a process that its median leaves out: caches and allocator settle.
SETTLING = 2


class Side:
    """A model under `torch.compile` with one backend, trained step by step.

    Args:
        name: "plain" or "mhc".
        model: the model; hyper-connections are attached already, so that the optimizer holds every parameter.
        backend: as for `torch.compile`.
        options: as for `torch.compile`.
        lr: the initial learning rate; `train` sets it anew for every step.

    Attributes:
        losses: training loss of every step, in nats.
        seconds: of every step.
        validation: `(step, loss)`, the step being how many were trained.
        preparation: seconds of work before the first step of this process that belong to its compilation.
    """

    def __init__(
        self, name: str, model: nn.Module, *, backend: str, options: dict[str, Any] | None = None, lr: float
    ) -> None:
        self.name = name
        self.backend = backend
        self.model = model
        self.compiled = torch.compile(model, backend=backend, options=options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.preparation = 0.0
        #: (first step, preparation) of every process that took part.
        self._starts: list[tuple[int, float]] = []
        self._warm = False

    def train(self, inputs: Tensor, targets: Tensor, *, seed: int, rate: float) -> float:
        """One step: forward, cross entropy, backward, clipping, AdamW. Returns the loss before the update, in nats.

        Args:
            inputs: what the model takes.
            targets: int64, of the shape of the logits without the last axis.
            seed: for the dropout of this step.
            rate: the learning rate of this step.
        """
        begin = time.perf_counter()
        torch.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        self.seconds.append(time.perf_counter() - begin)
        if not self._warm:
            self._starts.append((len(self.losses), self.preparation))
            self._warm = True
        self.losses.append(value)
        return value

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.compiled(inputs).logits
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def evaluate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over `batches` without dropout, in nats."""
        self.model.eval()
        loss = statistics.fmean(self._loss(*batch).item() for batch in batches)
        self.model.train()
        return loss

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step, without those that compiled and the few behind them."""
        for skipped in (1 + SETTLING, 1):
            cold = {start + i for start, _ in self._starts for i in range(skipped)}
            settled = [value for step, value in enumerate(self.seconds) if step not in cold]
            if settled:
                return statistics.median(settled)
        return statistics.median(self.seconds)  # every step compiled

    @property
    def compile_seconds(self) -> list[float]:
        """For every process that took part: preparation and first step, less what a step takes without compiling."""
        usual = self.step_seconds
        return [preparation + max(0.0, self.seconds[start] - usual) for start, preparation in self._starts]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the history."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": list(self.losses),
            "seconds": list(self.seconds),
            "validation": [list(point) for point in self.validation],
            "starts": [list(start) for start in self._starts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict`, every value as it is."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.seconds = list(state["seconds"])
        self.validation = [(int(step), float(loss)) for step, loss in state["validation"]]
        self._starts = [(int(step), float(preparation)) for step, preparation in state["starts"]]
