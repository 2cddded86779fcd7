"""Something that is run and timed: a forward, a backward, and what ends the round."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

__all__ = ["SITES", "SiteWorkload", "StepWorkload", "Times", "Workload"]

_LR = 1e-4
#: Sites that the benchmark of one site runs one after the other, each with tensors of its own.
SITES = 8


@dataclass(frozen=True)
class Times:
    """Seconds of one round, for one site or one step. `total` is forward and backward, and the optimizer's step where there is one."""

    forward: float
    backward: float
    total: float


class Workload:
    """One contender in one benchmark.

    Attributes:
        device: "cpu" or "cuda".
        repeats: times and memory are divided by it.
    """

    def __init__(self, device: str, repeats: int = 1) -> None:
        self.device, self.repeats = device, repeats

    def forward(self) -> Any:
        """Gives what `backward` takes."""
        raise NotImplementedError

    def backward(self, outputs: Any) -> None:
        """Leaves gradients behind."""
        raise NotImplementedError

    def finish(self) -> None:
        """What belongs to a step after the backward; timed."""

    def clear(self) -> None:
        """Takes the gradients away; not timed."""

    def timed(self) -> Times:
        """Runs once."""
        begin = self._now()
        outputs = self.forward()
        forward = self._now()
        self.backward(outputs)
        backward = self._now()
        self.finish()
        end = self._now()
        del outputs
        self.clear()
        return Times(*(span / self.repeats for span in (forward - begin, backward - forward, end - begin)))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()


class SiteWorkload(Workload):
    """Sites as in a model: the forward of one after the other, then the backward of the last first. None finds its tensors in a cache.

    Gradients of all outputs go in, gradients of all inputs and parameters come out. All sites share their parameters.

    Attributes:
        gradients: of inputs and parameters, what the latest site gave; `clear` drops them. Not collected in `grad`, which would copy those that
            a site merely passes on.
    """

    def __init__(
        self, device: str, call: Callable[..., Any], module: nn.Module, inputs: Sequence[tuple[Tensor, ...]]
    ) -> None:
        super().__init__(device, len(inputs))
        self._call, self._inputs, self._parameters = call, inputs, tuple(module.parameters())
        self._incoming: list[list[Tensor]] = []
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self) -> list[tuple[Tensor, ...]]:
        """The outputs of every site."""
        return [self._call(*site) for site in self._inputs]

    def backward(self, outputs: list[tuple[Tensor, ...]]) -> None:
        """From random gradients, the same ones every time. Empties `outputs`, so that memory is freed on the way."""
        if not self._incoming:
            self._incoming = [[torch.randn_like(tensor) for tensor in site] for site in outputs]
        for site, incoming in zip(reversed(self._inputs), reversed(self._incoming), strict=True):
            self.gradients = torch.autograd.grad(outputs.pop(), (*site, *self._parameters), incoming)

    def clear(self) -> None:
        """Drops the gradients."""
        self.gradients = ()


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
