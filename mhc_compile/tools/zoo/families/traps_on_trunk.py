"""A trunk with a trap beside it: its residual adds are rewritten, and the additions that pass every local test are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.passes import Reason
from mhc_compile.tools.zoo.families.parts import WIDTH, FeedForward, Framed, vectors
from mhc_compile.tools.zoo.family import Expected, Family, Mode, no_chain

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Case

__all__ = ["FAMILIES"]


class Base(nn.Module):
    """`x + f(x)`, and a second layer for the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.norm = FeedForward(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)


class SideAdd(Base):
    """Zamba: `x + f(x + g(x))`; the inner sum feeds the branch and never returns to the trunk."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x + self.g(x))


class DirectPath(Base):
    """A state-space mixer: its own input is added to what the scan gives, `scan(u) + D u`, inside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.out = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(self.g(self.norm(x)))
        scanned = torch.cumsum(self.f[1](u).chunk(2, dim=-1)[0], dim=1)
        return x + self.out(scanned + self.d * u)


class SharedModulation(nn.Module):
    """`x + f(norm(x) + c)`: the conditioning c [B, T, C] is added in every block, and from the second on x depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), FeedForward(norm=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.f(self.norm(x) + c)


class QueryPositions(nn.Module):
    """DETR: positions are added for q and k alone, to the value of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.positions = nn.Parameter(torch.randn(2, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        placed = x + self.positions
        scores = self.q(placed) @ self.k(placed).transpose(1, 2)
        return x + scores.softmax(-1) @ self.v(x)


class ValueMix(nn.Module):
    """Value residual: every block mixes the values of the first into its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.v, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = self.v(self.norm(x))
        mixed = v if first is None else 0.5 * v + 0.5 * first
        return x + self.out(mixed.cumsum(1)), v if first is None else first


class ValueResidual(nn.Module):
    """A network of these."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(ValueMix() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.into(x), None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class ConstantShift(Base):
    """`x + 0.01 ones_like(x)` between two adds: the shape of x, and not its value."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.ones_like(x)
        return x + self.f(x)


class ZeroedBranch(Base):
    """`x + zeros_like(g(x))`: a branch with a product, of which only the shape is left."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * (x + torch.zeros_like(self.g(x))).mean()


class SizeOnly(Base):
    """`h + noise of x's size`, inside the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.g(x) + torch.full((x.size(0), x.size(1), WIDTH), 0.1))


class SummedStates(nn.Module):
    """The mean of all hidden states: each is an ancestor of the next, and their sum is no residual add."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(FeedForward() for _ in range(layers))

    def forward(self, x: Tensor) -> dict[str, Any]:
        states: list[Tensor] = [self.into(x)]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        return {"last": states[-1], "mean": sum(states[1:], states[0]) / len(states)}


class ConvBlock(nn.Module):
    """`x + conv(relu(x))` on images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class Pyramid(nn.Module):
    """FPN over three levels of residual stages: `lateral(level) + upsampled(level above)`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stages = nn.ModuleList(nn.Sequential(*(ConvBlock() for _ in range(layers))) for _ in range(3))
        self.lateral = nn.ModuleList(nn.Conv2d(8, 6, 1) for _ in range(3))
        self.shrink = nn.ModuleList(nn.Conv2d(8, 8, 2, 2) for _ in range(2))

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
    """Hyper-connections by hand: n streams, mixed by a matrix, `mix · H + post ⊗ f(pre · H)`. There is nothing to replace."""

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
    """A network of these, mixed by learned matrices or by matrices computed from the streams."""

    def __init__(self, layers: int, *, dynamic: bool = False) -> None:
        super().__init__()
        blocks = (ManyStreams(dynamic=dynamic) for _ in range(layers))
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.into(x)[:, :, None].expand(-1, -1, 3, -1)).mean(2)


class TwoAges(nn.Module):
    """`f(x) + x + before`: the sum has two skips of different age; `before` is no part of the branch."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(FeedForward() for _ in range(layers + 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x, before = x + self.blocks[0](x), x
        for block in self.blocks[1:]:
            x, before = block(x) + x + before, x
        return x


class FirstMixed(nn.Module):
    """Every block begins with `a x + b x0`, x0 the embedding: point by point, and x0 is an ancestor of x."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(FeedForward() for _ in range(layers))
        self.a, self.b = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.into(x)
        for layer, block in enumerate(self.blocks):
            x = self.a[layer] * x + self.b[layer] * first
            x = x + block(x)
        return x


def _trap(
    name: str, make: Callable[[int], Case], lengths: Callable[[int], tuple[int, ...]], *reasons: Reason, note: str = ""
) -> Family:
    def expected(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
        return Expected(lengths(layers), reasons=frozenset(reasons), note=note)

    return Family(name, "traps_on_trunk", make, expected)


def _network(kind: type[nn.Module], *shape: int) -> Callable[[int], Case]:
    return lambda layers: (kind(layers), (torch.randn(*(shape or (2, 5, 8))),), {})


def _conditioned(layers: int) -> Case:
    return Framed([SharedModulation() for _ in range(layers)]), (torch.randn(2, 5, 8), torch.randn(2, 5, WIDTH)), {}


def _mixed(layers: int) -> Case:
    return HyperConnected(layers, dynamic=True), (torch.randn(2, 5, 8),), {}


_SIDE, _LONG, _INDEPENDENT = Reason.SIDE_ADD, Reason.LONG_SKIP, Reason.INDEPENDENT
FAMILIES: tuple[Family, ...] = (
    _trap("trap-side-add", vectors(SideAdd), lambda n: (n,), _SIDE),
    _trap("trap-direct-path", vectors(DirectPath), lambda n: (n,), _SIDE),
    _trap("trap-shared-modulation", _conditioned, lambda n: (n,), _SIDE, _INDEPENDENT),
    _trap("trap-query-positions", vectors(QueryPositions), lambda n: (n,), _INDEPENDENT),
    _trap("trap-value-residual", _network(ValueResidual), lambda n: (n,), _SIDE),
    _trap("trap-constant-shift", vectors(ConstantShift), lambda n: (n,), Reason.NOT_DIFFERENTIABLE),
    _trap("trap-zeroed-branch", vectors(ZeroedBranch), lambda n: (n,), Reason.NOT_DIFFERENTIABLE),
    _trap("trap-size-only", vectors(SizeOnly), lambda n: (n,), _INDEPENDENT),
    _trap("trap-summed-states", _network(SummedStates), lambda n: (n,), _LONG, _INDEPENDENT),
    _trap("trap-pyramid", _network(Pyramid, 2, 3, 8, 8), lambda n: (n, n, n), Reason.PROJECTED_SKIP),
    _trap("trap-many-streams", _network(HyperConnected), no_chain, Reason.PROJECTED_SKIP),
    _trap("trap-mixed-streams", _mixed, no_chain, Reason.MULTI_STREAM, Reason.BROADCAST),
    _trap("trap-first-mixed", _network(FirstMixed), lambda n: (n,), _LONG, _INDEPENDENT),
    _trap("trap-two-ages", _network(TwoAges), lambda n: (n + 1,), _LONG),
)
