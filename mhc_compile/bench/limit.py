"""The physical limit of a site: the bytes that must move and the products that must be taken, counted by hand and measured.

NOTES.md has the terms. Units: elements per token and flops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhc_compile.bench.workload import Times, Workload

if TYPE_CHECKING:
    from mhc_compile.bench.shape import Shape

__all__ = ["Limit", "Moved", "flops", "moved"]


class Moved:
    """Elements per token that a site must read and write, in one direction."""

    def __init__(self, read: int, written: int) -> None:
        self.read, self.written = read, written

    @property
    def total(self) -> int:
        """Both."""
        return self.read + self.written


def moved(shape: Shape) -> tuple[Moved, Moved]:
    """Forward and backward. With n = 4: 10 C and 15 C.

    forward   reads X (n C) and f (C); writes X' (n C) and h (C)
    backward  reads dX' (n C), dh (C), X (n C) and f (C); writes dX (n C) and df (C)
    """
    n, width = shape.streams, shape.width
    return Moved((n + 1) * width, (n + 1) * width), Moved((2 * n + 2) * width, (n + 1) * width)


def flops(shape: Shape) -> tuple[int, int]:
    """Forward and backward: the projection `vec(X') phi`, and its two gradients. 2 T nC (n² + 2n) each."""
    one = 2 * shape.tokens * shape.streams * shape.width * shape.coefficients
    return one, 2 * one


class Limit(Workload):
    """One site's bytes as a copy and its products as `torch.mm`, in the dtype of the streams.

    The forward is `copy_` (as much is written as read), the backward `add(out=)` of two buffers (twice as much is read as written).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.device)
        here = {"device": shape.device, "dtype": shape.real}
        forward, backward = moved(shape)
        size = shape.tokens * max(forward.written, backward.written)
        assert backward.read == 2 * backward.written
        self._source, self._other = torch.ones(size, **here), torch.ones(size, **here)  # type: ignore[call-overload]
        self._target = torch.empty(size, **here)  # type: ignore[call-overload]
        wide, columns = shape.streams * shape.width, shape.coefficients
        self._streams = torch.randn(shape.tokens, wide, **here)  # type: ignore[call-overload]
        self._phi = torch.randn(wide, columns, **here)  # type: ignore[call-overload]
        self._logits = torch.randn(shape.tokens, columns, **here)  # type: ignore[call-overload]
        self._outs = [torch.empty_like(tensor) for tensor in (self._logits, self._phi, self._streams)]

    @torch.no_grad()
    def forward(self) -> None:
        """10 C per token at n = 4, and one product."""
        self._target.copy_(self._source)
        torch.mm(self._streams, self._phi, out=self._outs[0])

    @torch.no_grad()
    def backward(self, outputs: None) -> None:  # noqa: ARG002 - nothing comes from the forward
        """15 C per token at n = 4, and two products."""
        torch.add(self._source, self._other, out=self._target)
        torch.mm(self._streams.t(), self._logits, out=self._outs[1])
        torch.mm(self._logits, self._phi.t(), out=self._outs[2])


def in_step(plain: Times, site: Times, sites: int) -> Times:
    """The limit of a training step: the plain step, and every site's limit on top of it."""
    forward, backward = sites * site.forward, sites * site.backward
    return Times(plain.forward + forward, plain.backward + backward, plain.total + forward + backward)
