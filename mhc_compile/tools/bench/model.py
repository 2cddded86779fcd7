"""The model of the training step: GPT-2 in shape, and the same blocks round whichever residual connection a contender has.

Both models build their blocks first, so that one seed gives the same weights to every contender.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mhc_compile.tools.bench.residual import Ends, Residual
    from mhc_compile.tools.bench.shape import Shape

__all__ = ["Attention", "Block", "Mlp", "PlainModel", "StreamsModel", "batch", "parameters"]


class Attention(nn.Module):
    """Layer norm, causal attention, projection: [1, T, C] to [1, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone, without the residual add."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Layer norm, 4C, GELU, C: [1, T, C] to [1, T, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The branch alone, without the residual add."""
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two sites: `x + attn(x)`, then `x + mlp(x)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """The plain residual."""
        x = x + self.attn(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class _Model(nn.Module):
    """Embeddings, blocks, tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.to(device=shape.device, dtype=shape.real)

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, T] to [1, T, C]."""
        return self.embedding(tokens) + self.positions.weight  # type: ignore[no-any-return]

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats, [1, T, C] and [1, T] to a scalar in float32."""
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class PlainModel(_Model):
    """The plain residual."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of one sequence."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.loss(x, targets)


class StreamsModel(_Model):
    """The same blocks on the streams of a contender.

    Args:
        shape: the sizes.
        connect: builds one residual connection for every site, in order, and the ends of the streams.
    """

    def __init__(self, shape: Shape, connect: Callable[[Shape, int], tuple[Iterable[Residual], Ends]]) -> None:
        super().__init__(shape)
        sites, ends = connect(shape, shape.sites)
        self.sites, self.ends = nn.ModuleList(sites).to(shape.device), ends.to(shape.device)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of one sequence."""
        streams = self.ends.enter(self.embed(tokens))
        sites = iter(self.sites)
        for block in self.blocks:
            for branch in block.children():
                site: Any = next(sites)
                h, held = site.read(streams)
                streams = site.write(branch(h), *held)
        return self.loss(self.ends.leave(streams), targets)


def parameters(module: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [1, T] each, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(shape.vocabulary, (1, shape.tokens + 1), generator=generator).to(shape.device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
