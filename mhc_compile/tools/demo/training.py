"""Two sides on the same batches, step by step in turn, so that both see the same data and the same machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import mhc_compile
import mhc_compile.results
from mhc_compile.errors import MhcError
from mhc_compile.tools.demo.models import build_model
from mhc_compile.tools.demo.side import Side
from mhc_compile.tools.demo.tasks import stable_seed

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.tools.demo.settings import Settings
    from mhc_compile.tools.demo.tasks import Task

__all__ = ["EVERY", "Duel", "mhc_options", "rate"]

#: Steps between two validations.
EVERY = 50
#: Steps over which the learning rate rises.
WARM_UP = 100


def rate(step: int, peak: float) -> float:
    """Learning rate of `step`: a linear rise over 100 steps, then peak · sqrt(100 / step).

    It depends on the step alone and not on the length of the run: a run that is continued with more steps has the rates
    of one long run.
    """
    return peak * min((step + 1) / WARM_UP, math.sqrt(WARM_UP / (step + 1)))


def mhc_options(settings: Settings) -> dict[str, Any] | None:
    """The options of backend="mhc": none, unless another inner compiler was asked for."""
    return None if settings.inner_backend == "inductor" else {"inner_backend": settings.inner_backend}


def check_same_weights(plain: nn.Module, other: nn.Module) -> None:
    """Compares every parameter and buffer of `plain` with the one of the same name in `other`, bit for bit.

    Raises:
        MhcError: naming the first that differs.
    """
    others = other.state_dict()
    for name, value in plain.state_dict().items():
        if name not in others or not torch.equal(value, others[name]):
            raise MhcError(f"the two models start from different weights: {name} differs")


@dataclass(frozen=True)
class Losses:
    """Training losses of one step before its update, in nats."""

    plain: float
    mhc: float


class Duel:
    """The plain model and the one with hyper-connections, from the same weights.

    The only difference between the two is the backend: `torch.compile(model)` and `torch.compile(model,
    backend="mhc")`, and that the second got its hyper-connections ahead of the first call, so that a checkpoint can be
    loaded into them and the optimizer knows them.

    Attributes:
        step: how many steps were trained.
        plain: the one side.
        mhc: the other.
    """

    def __init__(self, settings: Settings, task: Task) -> None:
        self.settings = settings
        self.task = task
        self.step = 0
        self._held_out = task.validation()
        models = [build_model(settings, task.classes) for _ in range(2)]
        begin = time.perf_counter()
        mhc_compile.attach(models[1], task.training(0)[0], options=mhc_options(settings))
        attaching = time.perf_counter() - begin
        check_same_weights(*models)
        self.plain = Side("plain", models[0], backend=settings.inner_backend, lr=settings.lr)
        self.mhc = Side("mhc", models[1], backend="mhc", options=mhc_options(settings), lr=settings.lr)
        self.mhc.preparation = attaching

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both."""
        return self.plain, self.mhc

    def advance(self) -> Losses:
        """One step of both, in alternating order.

        Batch, dropout and learning rate are functions of the seed and the step alone.
        """
        inputs, targets = self.task.training(self.step)
        seed = stable_seed("dropout", self.settings.seed, self.step)
        losses = {}
        for side in self.sides if self.step % 2 == 0 else reversed(self.sides):
            losses[side.name] = side.train(inputs, targets, seed=seed, rate=rate(self.step, self.settings.lr))
        self.step += 1
        return Losses(**losses)

    @property
    def due(self) -> bool:
        """Whether both sides are to be validated now: every 50 steps, a function of the step alone."""
        return self.step % EVERY == 0 and not self._validated

    @property
    def _validated(self) -> bool:
        return bool(self.plain.validation) and self.plain.validation[-1][0] == self.step

    def validate(self) -> Losses:
        """Validation losses of both sides as they are."""
        return Losses(**{side.name: side.evaluate(self._held_out) for side in self.sides})

    def final(self) -> Losses:
        """Validation losses of both sides at this step, from the history if they are there."""
        if self._validated:
            return Losses(**{side.name: side.validation[-1][1] for side in self.sides})
        return self.validate()

    def record(self, validation: Losses) -> None:
        """Writes validation losses into the history."""
        self.plain.validation.append((self.step, validation.plain))
        self.mhc.validation.append((self.step, validation.mhc))

    def stability(self) -> mhc_compile.results.Stability:
        """Measure the hyper-connections on the first validation batch."""
        self.mhc.model.eval()
        try:
            return mhc_compile.stability(self.mhc.model, self._held_out[0][0], options=mhc_options(self.settings))
        finally:
            self.mhc.model.train()

    def state_dict(self) -> dict[str, Any]:
        """All of it: what the next step depends on, and the history."""
        return {"step": self.step, "sides": {side.name: side.state_dict() for side in self.sides}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.step = int(state["step"])
        for side in self.sides:
            side.load_state_dict(state["sides"][side.name])
