"""The physical limit of a site: the bytes that must move and the products that must be taken, counted by hand and measured.

NOTES.md has the terms. Units: elements per token and flops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mhc_compile.tools.bench.workload import SITES, Times, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.tools.bench.shape import Shape

__all__ = ["Limit", "Moved", "flops", "in_step", "moved"]


@dataclass(frozen=True)
class Moved:
    """Elements per token that a site must read and write, in one direction."""

    read: int
    written: int

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
    """A site's bytes as a copy and its products as `torch.mm`, in the dtype of the streams, for as many sites as the contenders run.

    The forward is `copy_` (as much is written as read), the backward `add(out=)` of two buffers (twice as much is read as written). The products
    take as streams what the copy has just written.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.device, SITES)
        forward, backward = moved(shape)
        assert forward.read == forward.written == backward.written == backward.read // 2
        size, wide = shape.tokens * forward.written, shape.streams * shape.width

        def buffer(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=shape.device, dtype=shape.real)

        self._sites = [(buffer(size), buffer(size), buffer(size)) for _ in range(SITES)]
        self._streams = [target[: shape.tokens * wide].view(shape.tokens, wide) for _, _, target in self._sites]
        self._phi, self._logits = buffer(wide, shape.coefficients), buffer(shape.tokens, shape.coefficients)
        self._out, self._gradient = torch.empty_like(self._logits), torch.empty_like(self._phi)

    @torch.no_grad()
    def forward(self) -> None:
        """10 C per token at n = 4, and one product."""
        for (source, _, target), streams in zip(self._sites, self._streams, strict=True):
            target.copy_(source)
            torch.mm(streams, self._phi, out=self._out)

    @torch.no_grad()
    def backward(self, outputs: None) -> None:  # noqa: ARG002 - nothing comes from the forward
        """15 C per token at n = 4, and two products."""
        for (source, other, target), streams in zip(reversed(self._sites), reversed(self._streams), strict=True):
            torch.add(source, other, out=target)
            torch.mm(streams.t(), self._logits, out=self._gradient)
            torch.mm(self._logits, self._phi.t(), out=streams)


def in_step(plain: Times, site: Times, sites: int) -> Times:
    """The limit of a training step: the plain step, and every site's limit on top of it."""
    forward, backward = sites * site.forward, sites * site.backward
    return Times(plain.forward + forward, plain.backward + backward, plain.total + forward + backward)
