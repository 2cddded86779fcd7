"""One site as every contender cuts it: read the branch input off the streams, run the branch, write its output back.

    streams = ends.enter(x)
    h, held = site.read(streams); streams = site.write(branch(h), *held)        for every site
    x       = ends.leave(streams)

The benchmark of a single site measures what lies between two branches: the write of one site and the read of the next (`Cell`). That is where a
residual add is in the plain model, and it is what one pass over the streams can do at best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mhc_compile.tools.bench.shape import Shape

__all__ = ["Cell", "Ends", "PlainCell", "Residual", "example"]


class Residual(nn.Module):
    """The residual connection of one site."""

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The branch input [1, T, C], and what `write` needs of the streams."""
        raise NotImplementedError

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """New streams from the branch output [1, T, C] and what `read` gave."""
        raise NotImplementedError


class Ends(nn.Module):
    """Streams [1, T, n, C] as copies, and back as their mean."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams

    def enter(self, x: Tensor) -> Tensor:
        """[1, T, C] to the streams of this formulation."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1]).contiguous()

    def leave(self, streams: Tensor) -> Tensor:
        """The streams to [1, T, C]."""
        return streams.mean(-2)


class Cell(nn.Module):
    """The write of a site and the read of the next one: `(branch, *held)` to `(h, *held')`."""

    def __init__(self, site: Residual) -> None:
        super().__init__()
        self.site = site

    def forward(self, branch: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        """All outputs carry gradients in the benchmark, as in a model."""
        h, rest = self.site.read(self.site.write(branch, *held))
        return h, *rest


class PlainCell(nn.Module):
    """The same place in the plain model: `(branch, x)` to `x + branch`, which is both the trunk and the next branch input."""

    def forward(self, branch: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """[1, T, C] each."""
        return (x + branch,)


@torch.no_grad()
def example(shape: Shape, site: Residual, ends: Ends) -> tuple[Tensor, ...]:
    """Inputs of a cell, `(branch, *held)`: streams that differ from each other, and the coefficients that the site reads off them."""
    branch, x = (torch.randn(1, shape.tokens, shape.width, device=shape.device, dtype=shape.real) for _ in range(2))
    streams = ends.enter(x)
    streams = streams + 0.5 * torch.randn_like(streams)
    _, held = site.read(streams)
    return tuple(tensor.detach().clone().requires_grad_() for tensor in (branch, *held))
