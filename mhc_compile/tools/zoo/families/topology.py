"""Networks by how their blocks are wired: shared, nested, called twice, read from outside, joined by long skips."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, Attention, Block, Each, Embedded, FeedForward, Framed, Norm, Residual, Square, Stack, ids,
    linear, network, vectors,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Case, Family, chains, per_layer

__all__ = ["FAMILIES"]

_BLOCKS, _MLPS = Each(Residual), Each(FeedForward)
_STACK = Stack(Residual)


class Shared(nn.Module):
    """ALBERT, universal transformer: one layer of two sites, run as often as there are layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.norm, self.attn, self.mlp = layers, Norm(), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = x + self.attn(self.norm(x))
            x = x + self.mlp(x)
        return x


class Siamese(Block, into=INTO, encoder=_STACK):
    """One encoder, called on two inputs; the sum of its results is no residual add."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.encoder(self.into(a)) + self.encoder(self.into(b))


class Twice(nn.Module):
    """The whole network on the input, and again on its output."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.encoder, self.back = Framed([Residual() for _ in range(layers)]), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.back(self.encoder(x)))


class HiddenStates(Block, into=INTO, blocks=_BLOCKS, out=OUT):
    """Returns the trunk before every block and after the last, and the result."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = [self.into(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return {"logits": self.out(states[-1]), "hidden": tuple(states)}


class AuxiliaryHeads(HiddenStates):
    """Early exits: a head reads the trunk after every block."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.into(x)
        early = []
        for block in self.blocks:
            x = block(x)
            early.append(self.out(x.mean(1)))
        return {"logits": self.out(x), "early": early}


class Nested(Block, inner=lambda: Stack(Residual)(2), out=Square):
    """A residual block of residual blocks: `x + f(g(x))`, where g runs two blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x))


class Wide(Residual, mlp=partial(FeedForward, 24)):
    """`x + mlp(norm(x))` on 24 features."""


class TwoWidths(nn.Module):
    """Blocks of one width, a projection, blocks of another."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        first, second = ([kind() for _ in range(layers)] for kind in (Residual, Wide))
        self.body = nn.Sequential(nn.Linear(8, 16), *first, nn.Linear(16, 24), *second, nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Bare(Block, mlps=_MLPS):
    """The trunk is the input of the graph and its output: nothing stands at either end."""

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(x)
        return x


class GlobalSkip(Block, into=INTO, blocks=_STACK, last=Square, out=OUT):
    """`x0 + linear(blocks(x0))`: the input of the first block is added again after the last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(self.last(self.blocks(x)) + x)


class Reversible(Block, into=INTO, out=linear(2 * WIDTH, 4), f=_MLPS, g=_MLPS):
    """RevNet: two halves that start alike, `a += f(b)`, `b += g(a)`; each half is a trunk."""

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.into(x)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.out(torch.cat([a, b], dim=-1))


class PartialChannels(Block, into=linear(8, 2 * WIDTH), out=linear(2 * WIDTH, 4), blocks=_STACK):
    """CSP: half of the features goes through residual blocks, the other half around them."""

    def forward(self, x: Tensor) -> Tensor:
        moved, kept = self.into(x).chunk(2, dim=-1)
        return self.out(torch.cat([self.blocks(moved), kept], dim=-1))


class Hooked(Block, into=INTO, blocks=_STACK):
    """A forward hook adds a constant t to the output of each block: `(x + f(x)) + 0.01 t`."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.register_buffer("shift", torch.randn(WIDTH))
        for block in self.blocks:
            block.register_forward_hook(self._move)

    def _move(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 0.01 * self.get_buffer("shift")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.into(x))


def _shared(layers: int) -> Case:
    return Embedded([Shared(layers)]), (ids(),), {}


_ONE, _PAIR = per_layer(1), per_layer(1, 1)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "topology": (
        Family("shared-layer", _shared, per_layer(2)),
        Family("siamese", network(Siamese, (2, 5, 8), (2, 5, 8)), _PAIR),
        Family("called-twice", network(Twice), _PAIR),
        Family("hidden-states", network(HiddenStates), _ONE),
        Family("auxiliary-heads", network(AuxiliaryHeads), _ONE),
        Family("nested", vectors(Nested), chains(lambda n: (n, *(2,) * n))),
        Family("two-widths", network(TwoWidths), _PAIR),
        Family("bare-trunk", network(Bare, (2, 5, WIDTH)), _ONE),
        Family("global-skip", network(GlobalSkip), chains(lambda n: (n, 1))),
        Family("reversible", network(Reversible), _PAIR),
        Family("partial-channels", network(PartialChannels), _ONE),
        Family("hooked", network(Hooked), _ONE),
    ),
}
