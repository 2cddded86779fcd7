"""The plain decoder of a shape, to be traced and never run: on the meta device it has no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mhc_compile.tools.scaling.shapes import Shape

__all__ = ["Decoder"]


def _linear(inwards: int, outwards: int) -> nn.Linear:
    return nn.Linear(inwards, outwards, bias=False)


class _Attention(nn.Module):
    """Causal attention, grouped or latent: [B, T, C] to [B, T, C]. Positions are left out: they move few bytes and cost few products."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        values = shape.heads * shape.head
        if shape.latent:
            wide = shape.heads * (shape.head + shape.rotary)
            inwards = shape.query_latent or shape.width
            self.query_down = _linear(shape.width, shape.query_latent) if shape.query_latent else nn.Identity()
            self.query = _linear(inwards, wide)
            self.down = _linear(shape.width, shape.latent + shape.rotary)
            self.up = _linear(shape.latent, 2 * values)
        else:
            keys = (shape.groups or shape.heads) * shape.head
            self.query, self.key, self.value = (_linear(shape.width, size) for size in (values, keys, keys))
        self.out = _linear(values, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._latent(x) if self.shape.latent else self._grouped(x)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            one(x).unflatten(-1, (-1, self.shape.head)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        share = self.shape.heads // (self.shape.groups or self.shape.heads)
        if share == 1:
            return q, k, v
        k, v = (one.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) for one in (k, v))
        return q, k, v

    def _latent(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        q = self.query(self.query_down(x)).unflatten(-1, (s.heads, -1)).transpose(1, 2)
        small, position = self.down(x).split([s.latent, s.rotary], -1)
        k, v = self.up(small).unflatten(-1, (s.heads, -1)).transpose(1, 2).chunk(2, -1)
        position = position.unsqueeze(1).expand(-1, s.heads, -1, -1)
        return q, torch.cat([k, position], -1), v


class _FeedForward(nn.Module):
    """Gated, as wide as the experts that a token runs through: [B, T, C] to [B, T, C]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.active * shape.hidden
        self.gate, self.up = _linear(shape.width, hidden), _linear(shape.width, hidden)
        self.down = _linear(hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention, self.feed_forward = _Attention(shape), _FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Ids int64 [B, T] to logits [B, T, vocabulary].

    Args:
        shape: all sizes but the number of blocks.
        layers: blocks.
    """

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = _linear(shape.width, shape.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
