"""The physical limit of a site: the bytes that must move and the products that must be computed.

README.md derives the counts. `Limit` is for CPU, `CopyLimit` for CUDA, where tensor cores multiply
while the bytes move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from mhc_compile.tools.bench.workloads import SITES, Times, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.tools.bench.sites import Shape


class Moved(NamedTuple):
    """Elements per token that a site must read and write, in one direction."""

    read: int
    written: int


def moved(shape: Shape) -> tuple[Moved, Moved]:
    """Return the traffic of forward and backward. With n = 4: 10 C and 15 C.

    forward   reads X (n C) and f (C); writes X' (n C) and h (C)
    backward  reads dX' (n C), dh (C), X (n C) and f (C); writes dX (n C) and df (C)

    A single pass has the same floor, and reaches it without a cache: X' is not needed again.
    """
    n, width = shape.streams, shape.width
    return Moved((n + 1) * width, (n + 1) * width), Moved((2 * n + 2) * width, (n + 1) * width)


class Limit(Workload):
    """The bytes of `SITES` sites as copies and their products as `torch.mm`, in the streams' dtype.

    The forward is `copy_`, which writes as much as it reads; the backward is `add(out=)` of two
    buffers, which reads twice as much as it writes. The products read what was just written.
    Without `gradients` there is no backward.
    """

    def __init__(self, shape: Shape, *, gradients: bool = True) -> None:
        super().__init__(shape.device, SITES)
        self._gradients = gradients
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
        """Move 10 C elements per token at n = 4, and compute one product."""
        for (source, _, target), streams in zip(self._sites, self._streams, strict=True):
            target.copy_(source)
            torch.mm(streams, self._phi, out=self._out)

    @torch.no_grad()
    def backward(self, outputs: None) -> None:  # noqa: ARG002 - the forward returns nothing
        """Move 15 C elements per token at n = 4, and compute two products."""
        if not self._gradients:
            return
        for (source, other, target), streams in zip(reversed(self._sites), reversed(self._streams), strict=True):
            torch.add(source, other, out=target)
            torch.mm(streams.t(), self._logits, out=self._gradient)
            torch.mm(self._logits, self._phi.t(), out=streams)


class CopyLimit(Workload):
    """The bytes of one site at the bandwidth of a copy of `size` bytes within the device."""

    def __init__(self, shape: Shape, size: int = 1 << 30, *, gradients: bool = True) -> None:
        super().__init__(shape.device)
        self._source = torch.randint(256, (size,), dtype=torch.uint8, device=shape.device)
        self._target = torch.empty_like(self._source)
        copies = shape.tokens * shape.real.itemsize / (2 * size)  # a copy reads and writes
        self._shares = [sum(one) * copies * wanted for one, wanted in zip(moved(shape), (1, gradients), strict=True)]

    def forward(self) -> None:
        """Copy."""
        self._target.copy_(self._source)

    def timed(self) -> Times:
        """Return the times of one site."""
        copy = super().timed()
        forward, backward = (copy.total * share for share in self._shares)
        return Times(forward, backward, forward + backward, copy.host)


def in_step(plain: Times, site: Times, sites: int) -> Times:
    """Return the limit of a model: the plain model, and every site's limit in addition."""
    forward, backward = sites * site.forward, sites * site.backward
    return Times(plain.forward + forward, plain.backward + backward, plain.total + forward + backward)
