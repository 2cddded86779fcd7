"""A trunk and a trap: residual adds, and additions that pass every local test but are none."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.passes import Reason

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, WIDTH, Block, Each, FeedForward, Norm, Plain, Square, Stack, conv2d, network, parameter, spelled, vectors,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Case, Expect, Expected, Family, Mode, per_layer

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["FAMILIES"]


class Base(Block, f=FeedForward, g=Square, norm=Norm):
    """`x + f(x)`, and a second layer for the trap."""


class DirectPath(Base, d=parameter(), out=Square):
    """A state-space mixer: `scan(u) + D u` inside the branch, u the input of the scan."""

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(self.g(self.norm(x)))
        scanned = torch.cumsum(self.f[1](u).chunk(2, dim=-1)[0], dim=1)
        return x + self.out(scanned + self.d * u)


_NO_BIAS = partial(Square, bias=False)


class QueryPositions(
    Block, q=_NO_BIAS, k=_NO_BIAS, v=_NO_BIAS, positions=lambda: nn.Parameter(torch.randn(2, 5, WIDTH))
):  # fmt: skip
    """DETR: positions are added to the trunk's value for q and k only."""

    def forward(self, x: Tensor) -> Tensor:
        placed = x + self.positions
        scores = self.q(placed) @ self.k(placed).transpose(1, 2)
        return x + scores.softmax(-1) @ self.v(x)


class ValueMix(Block, norm=Norm, v=Square, out=Square):
    """Value residual: every block mixes the values of the first into its own."""

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = self.v(self.norm(x))
        mixed = v if first is None else 0.5 * v + 0.5 * first
        return x + self.out(mixed.cumsum(1)), v if first is None else first


class ValueResidual(Block, into=INTO, blocks=Each(ValueMix)):
    """A network of `ValueMix` blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.into(x), None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class ConstantShift(Base):
    """`x + 0.01 ones_like(x)` between two adds: depends on the shape of x only."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.ones_like(x)
        return x + self.f(x)


class SummedStates(Block, into=INTO, blocks=Each(FeedForward)):
    """The mean of all hidden states: each depends on the last, and their sum is no residual add."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        states: list[Tensor] = [self.into(x)]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        return {"last": states[-1], "mean": sum(states[1:], states[0]) / len(states)}


class ConvBlock(Block, conv=conv2d(8, 8, 3, 1, 1)):
    """`x + conv(relu(x))` on images."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class Pyramid(nn.Module):
    """FPN over three levels of residual stages: `lateral(level) + upsampled(level above)`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stages = nn.ModuleList(Stack(ConvBlock)(layers) for _ in range(3))
        self.lateral, self.shrink = Each(conv2d(8, 6, 1))(3), Each(conv2d(8, 8, 2, 2))(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, levels = self.stem(x), []
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.shrink[index - 1](x))
            levels.append(x)
        merged = [self.lateral[-1](levels[-1])]
        for level, lateral in zip(reversed(levels[:-1]), reversed(self.lateral[:-1]), strict=True):
            merged.append(lateral(level) + F.interpolate(merged[-1], scale_factor=2.0))
        return merged


class ManyStreams(nn.Module):
    """Hyper-connections by hand: `mix · H + post ⊗ f(pre · H)` on n streams. Nothing to replace."""

    def __init__(self, n: int = 3, *, dynamic: bool = False) -> None:
        super().__init__()
        self.f, self.mix = FeedForward(), nn.Parameter(torch.eye(n))
        self.to_mix = nn.Linear(WIDTH, n) if dynamic else None
        self.pre, self.post = nn.Parameter(torch.full((n,), 1 / n)), nn.Parameter(torch.ones(n))

    def forward(self, streams: Tensor) -> Tensor:
        y = self.f(torch.einsum("n,btnc->btc", self.pre, streams))
        if self.to_mix is not None:
            mix = (self.mix + self.to_mix(streams)).softmax(-1)
            return mix @ streams + self.post[:, None] * y[:, :, None]
        return torch.einsum("mn,btnc->btmc", self.mix, streams) + self.post[:, None] * y[:, :, None]


class HyperConnected(nn.Module):
    """A network of `ManyStreams`, mixed by learned matrices or by matrices computed from the streams."""

    def __init__(self, layers: int, *, dynamic: bool = False) -> None:
        super().__init__()
        self.into, self.blocks = INTO(), Stack(partial(ManyStreams, dynamic=dynamic))(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.into(x)[:, :, None].expand(-1, -1, 3, -1)).mean(2)


class TwoAges(Block, into=INTO, blocks=Each(FeedForward, lambda layers: layers + 1)):
    """`f(x) + x + before`: two skips of different age; `before` is no part of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x, before = x + self.blocks[0](x), x
        for block in self.blocks[1:]:
            x, before = block(x) + x + before, x
        return x


class FirstMixed(nn.Module):
    """Every block begins with `a x + b x0`, x0 the embedding: point by point, and x depends on x0."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = INTO(), Each(FeedForward)(layers)
        self.a, self.b = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.into(x)
        for layer, block in enumerate(self.blocks):
            x = self.a[layer] * x + self.b[layer] * first
            x = x + block(x)
        return x


def _two_ages(layers: int, _mode: Mode) -> Expected:
    return Expected((layers + 1,), reasons=frozenset({Reason.LONG_SKIP}))


def _trap(name: str, make: Callable[[int], Case], *reasons: Reason, chains: int = 1) -> Family:
    return Family(name, make, per_layer(*(1,) * chains, reasons=reasons))


def _one(*reasons: Reason) -> Expect:
    return per_layer(1, reasons=reasons)


_SIDE, _LONG, _INDEPENDENT = Reason.SIDE_ADD, Reason.LONG_SKIP, Reason.INDEPENDENT
FAMILIES: dict[str, tuple[Family, ...]] = {
    "traps_on_trunk": (
        spelled("trap-side-add", "Zamba: `x + f(x + g(x))`; the inner sum feeds the branch and never returns to the trunk.",
                lambda block, x: x + block.f(x + block.g(x)), expected=_one(_SIDE), f=FeedForward, g=Square),
        _trap("trap-direct-path", vectors(DirectPath), _SIDE),
        spelled("trap-shared-modulation", "`x + f(norm(x) + c)`, c the same in every block: from the second on x depends on it.",
                lambda block, x, c: x + block.f(block.norm(x) + c), (2, 5, WIDTH), expected=_one(_SIDE, _INDEPENDENT),
                norm=Norm, f=Plain),
        _trap("trap-query-positions", vectors(QueryPositions), _INDEPENDENT),
        _trap("trap-value-residual", network(ValueResidual), _SIDE),
        _trap("trap-constant-shift", vectors(ConstantShift), Reason.NOT_DIFFERENTIABLE),
        spelled("trap-zeroed-branch", "`x + zeros_like(g(x))`: a branch with a product, of which only the shape is used.",
                lambda block, x: x + block.f(x) * (x + torch.zeros_like(block.g(x))).mean(),
                expected=_one(Reason.NOT_DIFFERENTIABLE), f=FeedForward, g=Square),
        spelled("trap-size-only", "`h + noise of x's size`, inside the branch.",
                lambda block, x: x + block.f(block.g(x) + torch.full((x.size(0), x.size(1), WIDTH), 0.1)),
                expected=_one(_INDEPENDENT), f=FeedForward, g=Square),
        _trap("trap-summed-states", network(SummedStates), _LONG, _INDEPENDENT),
        _trap("trap-pyramid", network(Pyramid, (2, 3, 8, 8)), Reason.PROJECTED_SKIP, chains=3),
        _trap("trap-many-streams", network(HyperConnected), Reason.PROJECTED_SKIP, chains=0),
        _trap("trap-mixed-streams", network(partial(HyperConnected, dynamic=True)), Reason.MULTI_STREAM, Reason.BROADCAST,
              chains=0),
        _trap("trap-first-mixed", network(FirstMixed), _LONG, _INDEPENDENT),
        Family("trap-two-ages", network(TwoAges), _two_ages),
    ),
}  # fmt: skip
