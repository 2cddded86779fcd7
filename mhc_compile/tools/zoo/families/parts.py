"""Layers that several handwritten families are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Case

__all__ = ["WIDTH", "Attention", "Embedded", "FeedForward", "Framed", "feature_maps", "tokens", "vectors"]

#: C of every handwritten family, and the size of its vocabulary.
WIDTH, VOCABULARY = 16, 31


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to `memory`. `x: [B, T, C]`."""

    def __init__(self, width: int = WIDTH, heads: int = 2, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        # No bias for k: its gradient is zero in exact arithmetic, and rounding noise otherwise.
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (self._split(y) for y in (self.q(x), self.k(source), self.v(source)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU, with a norm in front unless told otherwise."""

    def __init__(self, width: int = WIDTH, *, norm: bool = True) -> None:
        super().__init__(
            nn.LayerNorm(width) if norm else nn.Identity(),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )


class Embedded(nn.Module):
    """A language model around blocks: token embedding, blocks, norm, head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Framed(nn.Module):
    """Blocks between a linear layer into the width and one out of it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.into, self.blocks, self.out = nn.Linear(8, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x, *more)
        return self.out(x)


def tokens(block: Callable[[], nn.Module]) -> Callable[[int], Case]:
    """A language model of so many blocks, and token ids [2, 6]."""
    return lambda layers: (
        Embedded([block() for _ in range(layers)]).train(),
        (torch.arange(12).reshape(2, 6) * 5 % VOCABULARY,),
        {},
    )


def vectors(block: Callable[[], nn.Module]) -> Callable[[int], Case]:
    """So many blocks in a frame, and vectors [2, 5, 8]."""
    return lambda layers: (Framed([block() for _ in range(layers)]), (torch.randn(2, 5, 8),), {})


def feature_maps(body: Callable[[int], nn.Module], channels: int = 3, size: int = 8) -> Callable[[int], Case]:
    """A convolutional network of so many layers, and images [2, channels, size, size]."""
    return lambda layers: (body(layers), (torch.randn(2, channels, size, size),), {})
