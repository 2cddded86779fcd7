"""Networks by how their blocks are wired: shared, nested, called twice, joined by long skips."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, Block, Each, Embedded, FeedForward, Framed, Residual, Square, Stack, TransformerBlock, ids,
    linear, network, spelled, wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Family, chains, per_layer

_BLOCKS, _STACK, _MLPS = Each(Residual), Stack(Residual), Each(FeedForward)


class Shared(TransformerBlock):
    """ALBERT, universal transformer: one layer of two sites, run as often as there are layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = super().forward(x)
        return x


class Twice(nn.Module):
    """The whole network on the input, and again on its output."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.encoder, self.back = Framed([Residual() for _ in range(layers)]), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.back(self.encoder(x)))


def _hidden_states(net: Any, x: Tensor) -> dict[str, Any]:
    """Return the trunk before every block and after the last, and the result."""
    states = [net.into(x)]
    for block in net.blocks:
        states.append(block(states[-1]))
    return {"logits": net.out(states[-1]), "hidden": tuple(states)}


def _early_exits(net: Any, x: Tensor) -> dict[str, Any]:
    """Read the trunk by a head after every block (early exits)."""
    x = net.into(x)
    early = []
    for block in net.blocks:
        x = block(x)
        early.append(net.out(x.mean(1)))
    return {"logits": net.out(x), "early": early}


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


def _bare(net: Any, x: Tensor) -> Tensor:
    """`x + f(x)` on the input of the graph up to its output: nothing stands at either end."""
    for mlp in net.mlps:
        x = x + mlp(x)
    return x


def _global_skip(net: Any, x: Tensor) -> Tensor:
    """`x0 + linear(blocks(x0))`: the input of the first block is added again after the last."""
    x = net.into(x)
    return net.out(net.last(net.blocks(x)) + x)


def _reversible(net: Any, x: Tensor) -> Tensor:
    """RevNet: two halves that start alike, `a += f(b)`, `b += g(a)`; each half is a trunk."""
    a = b = net.into(x)
    for f, g in zip(net.f, net.g, strict=True):
        a = a + f(b)
        b = b + g(a)
    return net.out(torch.cat([a, b], dim=-1))


def _partial_channels(net: Any, x: Tensor) -> Tensor:
    """CSP: half of the features goes through residual blocks, the other half around them."""
    moved, kept = net.into(x).chunk(2, dim=-1)
    return net.out(torch.cat([net.blocks(moved), kept], dim=-1))


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


_ONE, _PAIR = per_layer(1), per_layer(1, 1)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "topology": (
        Family("shared-layer", lambda layers: (Embedded([Shared(layers)]), (ids(),), {}), per_layer(2)),
        wired("siamese", lambda net, a, b: net.encoder(net.into(a)) + net.encoder(net.into(b)), (2, 5, 8), (2, 5, 8),
              doc="One encoder, called on two inputs; the sum of its results is no residual add.",
              expected=_PAIR, into=INTO, encoder=_STACK),
        Family("called-twice", network(Twice), _PAIR),
        wired("hidden-states", _hidden_states, into=INTO, blocks=_BLOCKS, out=OUT),
        wired("auxiliary-heads", _early_exits, into=INTO, blocks=_BLOCKS, out=OUT),
        spelled("nested", lambda block, x: x + block.out(block.inner(x)),
                doc="`x + f(g(x))`, where g runs two residual blocks.",
                expected=chains(lambda n: (n, *(2,) * n)), inner=lambda: Stack(Residual)(2), out=Square),
        Family("two-widths", network(TwoWidths), _PAIR),
        wired("bare-trunk", _bare, (2, 5, WIDTH), mlps=_MLPS),
        wired("global-skip", _global_skip, expected=chains(lambda n: (n, 1)), into=INTO, blocks=_STACK, last=Square,
              out=OUT),
        wired("reversible", _reversible, expected=_PAIR, into=INTO, out=linear(2 * WIDTH, 4), f=_MLPS, g=_MLPS),
        wired("partial-channels", _partial_channels, into=linear(8, 2 * WIDTH), out=linear(2 * WIDTH, 4),
              blocks=_STACK),
        Family("hooked", network(Hooked), _ONE),
    ),
}  # fmt: skip
