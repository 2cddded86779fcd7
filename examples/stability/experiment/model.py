"""The model of every variant: a plain pre-norm decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Different bytes.
BYTES = 256


class Attention(nn.Module):
    """Causal self-attention: [B, T, C] to [B, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    """Two linear layers with GELU between: [B, T, C] to [B, T, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(x)))


class Block(nn.Module):
    """Two branches, each with its norm before it: two residual adds.

    With `scalars` an add is `a x + b f(x)`, with learned a and b that begin at 1.
    """

    def __init__(self, width: int, heads: int, *, scalars: bool) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.ones(4)) if scalars else None
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = Feedforward(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.scalars is None:
            x = x + self.attention(self.norm1(x))
            return x + self.feedforward(self.norm2(x))
        a, b, c, d = self.scalars
        x = a * x + b * self.attention(self.norm1(x))
        return c * x + d * self.feedforward(self.norm2(x))


class Decoder(nn.Module):
    """Next-byte model: ids int64 [B, T] to logits [B, T, 256].

    Initial weights are normal with mean 0. Their deviation is `embedding` for bytes, 0.02 for
    positions, and `weights / sqrt(width)` for linear layers, but `sqrt(2 layers)` times less for
    those that write to the residual stream, as in GPT-2.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        length: int,
        embedding: float,
        weights: float,
        scalars: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, scalars=scalars) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        linear = weights / width**0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "embed.weight":
                nn.init.normal_(parameter, std=embedding)
            elif name == "positions.weight":
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name and "scalars" not in name:
                writes = name.endswith(("out.weight", "fall.weight"))
                nn.init.normal_(parameter, std=linear / (2 * layers) ** 0.5 if writes else linear)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
