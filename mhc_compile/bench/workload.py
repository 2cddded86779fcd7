"""Something that is run and timed: a forward, a backward, and what ends the round."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["SiteWorkload", "StepWorkload", "Times", "Workload"]

_LR = 1e-4
#: Larger than the last cache of what this runs on.
_FLUSHED = 256 * 2**20
_flush: dict[str, torch.Tensor] = {}


@dataclass(frozen=True)
class Times:
    """Seconds of one round. `total` is forward and backward, and the optimizer's step where there is one."""

    forward: float
    backward: float
    total: float


class Workload(ABC):
    """One contender in one benchmark."""

    def __init__(self, device: str) -> None:
        self.device = device

    @abstractmethod
    def forward(self) -> Any:
        """Gives what `backward` takes."""

    @abstractmethod
    def backward(self, outputs: Any) -> None:
        """Leaves gradients behind."""

    def finish(self) -> None:
        """What belongs to a step after the backward; timed."""

    def clear(self) -> None:
        """Takes the gradients away; not timed."""

    def timed(self) -> Times:
        """Runs once, from cold caches: nobody finds its inputs in a cache because little ran since."""
        _evict(self.device)
        begin = self._now()
        outputs = self.forward()
        forward = self._now()
        self.backward(outputs)
        backward = self._now()
        self.finish()
        end = self._now()
        del outputs
        self.clear()
        return Times(forward - begin, backward - forward, end - begin)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()


class SiteWorkload(Workload):
    """One site: gradients of all outputs go in, gradients of all inputs and parameters come out."""

    def __init__(self, device: str, call: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(device)
        self._call, self._inputs = call, inputs
        self._leaves = [*inputs, *module.parameters()]
        self._gradients: list[Tensor] = []

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs of the cell."""
        return self._call(*self._inputs)  # type: ignore[no-any-return]

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """From random gradients, the same ones every time."""
        if not self._gradients:
            self._gradients = [torch.randn_like(output) for output in outputs]
        torch.autograd.backward(outputs, self._gradients)

    def clear(self) -> None:
        """As an optimizer would."""
        for leaf in self._leaves:
            leaf.grad = None


class StepWorkload(Workload):
    """One training step: loss, gradients, AdamW.

    Attributes:
        loss: of the last step, in nats.
    """

    def __init__(self, device: str, call: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        super().__init__(device)
        self._call, self._inputs = call, inputs
        # Before the first call, as scripts do; what the backend adds to the model then joins it.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)
        self.loss = float("nan")

    def forward(self) -> Tensor:
        """The loss."""
        return self._call(*self._inputs)  # type: ignore[no-any-return]

    def backward(self, outputs: Tensor) -> None:
        """From the loss."""
        outputs.backward()
        self.loss = float(outputs.detach())

    def finish(self) -> None:
        """AdamW."""
        self.optimizer.step()

    def clear(self) -> None:
        """No contender carries its gradients through the turns of the others."""
        self.optimizer.zero_grad()


def _evict(device: str) -> None:
    if device not in _flush:
        _flush[device] = torch.empty(_FLUSHED // 4, device=device)
    _flush[device].zero_()
