"""How blocks are wired: shared, nested, called twice, read from outside, joined by long skips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Attention, Embedded, FeedForward, Framed
from mhc_compile.tools.zoo.family import Case, Family, chains

__all__ = ["FAMILIES", "Block"]


class Block(nn.Module):
    """`x + mlp(norm(x))`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Shared(nn.Module):
    """ALBERT, universal transformer: one layer of two sites, run as often as there are layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.norm, self.attn, self.mlp = layers, nn.LayerNorm(WIDTH), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.layers):
            x = x + self.attn(self.norm(x))
            x = x + self.mlp(x)
        return x


class Siamese(nn.Module):
    """One encoder, called on two inputs; the sum of its results is no residual add."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.encoder = nn.Linear(8, WIDTH), nn.Sequential(*(Block() for _ in range(layers)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.encoder(self.into(a)) + self.encoder(self.into(b))


class Twice(nn.Module):
    """The whole network on the input, and again on its own output."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.encoder, self.back = Framed([Block() for _ in range(layers)]), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.back(self.encoder(x)))


class HiddenStates(nn.Module):
    """Returns the trunk before every block and after the last, beside the result."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks, self.out = (
            nn.Linear(8, WIDTH),
            nn.ModuleList(Block() for _ in range(layers)),
            nn.Linear(WIDTH, 4),
        )

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


class Nested(nn.Module):
    """A residual block of residual blocks: `x + f(g(x))`, where f runs two blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x))


class TwoWidths(nn.Module):
    """Blocks of one width, a projection, blocks of another."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        first, second = ([Block(width) for _ in range(layers)] for width in (16, 24))
        self.body = nn.Sequential(nn.Linear(8, 16), *first, nn.Linear(16, 24), *second, nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Bare(nn.Module):
    """The trunk is the input of the graph and its output: nothing stands at either end."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(FeedForward() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(x)
        return x


class GlobalSkip(nn.Module):
    """What the first block read is added again behind the last: `x0 + linear(blocks(x0))`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.Sequential(*(Block() for _ in range(layers)))
        self.last, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(self.last(self.blocks(x)) + x)


class Reversible(nn.Module):
    """RevNet: two halves that start alike, `a += f(b)`, `b += g(a)`; each half is a trunk."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(2 * WIDTH, 4)
        self.f, self.g = (nn.ModuleList(FeedForward() for _ in range(layers)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.into(x)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return self.out(torch.cat([a, b], dim=-1))


class PartialChannels(nn.Module):
    """CSP: half of the features goes through residual blocks, the other half around them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 2 * WIDTH), nn.Linear(2 * WIDTH, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        moved, kept = self.into(x).chunk(2, dim=-1)
        return self.out(torch.cat([self.blocks(moved), kept], dim=-1))


class Hooked(nn.Module):
    """A forward hook adds to what each block returns: `(x + f(x)) + 0.01 t` with a tensor t that nothing computes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.Sequential(*(Block() for _ in range(layers)))
        self.register_buffer("shift", torch.randn(WIDTH))
        for block in self.blocks:
            block.register_forward_hook(self._move)

    def _move(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 0.01 * self.get_buffer("shift")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.into(x))


def _vectors(network: nn.Module, inputs: int = 1, width: int = 8) -> Case:
    return network, tuple(torch.randn(2, 5, width) for _ in range(inputs)), {}


def _shared_ids(layers: int) -> Case:
    return Embedded([Shared(layers)]), (torch.arange(12).reshape(2, 6) % 31,), {}


_ONE = chains(lambda n: (n,))
_GROUP = "topology"
FAMILIES: tuple[Family, ...] = (
    Family("shared-layer", _GROUP, _shared_ids, chains(lambda n: (2 * n,))),
    Family("siamese", _GROUP, lambda n: _vectors(Siamese(n), 2), chains(lambda n: (n, n))),
    Family("called-twice", _GROUP, lambda n: _vectors(Twice(n)), chains(lambda n: (n, n))),
    Family("hidden-states", _GROUP, lambda n: _vectors(HiddenStates(n)), _ONE),
    Family("auxiliary-heads", _GROUP, lambda n: _vectors(AuxiliaryHeads(n)), _ONE),
    Family(
        "nested", _GROUP, lambda n: _vectors(Framed([Nested() for _ in range(n)])), chains(lambda n: (n, *(2,) * n))
    ),
    Family("two-widths", _GROUP, lambda n: _vectors(TwoWidths(n)), chains(lambda n: (n, n))),
    Family("bare-trunk", _GROUP, lambda n: _vectors(Bare(n), width=WIDTH), _ONE),
    Family("global-skip", _GROUP, lambda n: _vectors(GlobalSkip(n)), chains(lambda n: (n, 1))),
    Family("reversible", _GROUP, lambda n: _vectors(Reversible(n)), chains(lambda n: (n, n))),
    Family("partial-channels", _GROUP, lambda n: _vectors(PartialChannels(n)), _ONE),
    Family("hooked", _GROUP, lambda n: _vectors(Hooked(n)), _ONE),
)
