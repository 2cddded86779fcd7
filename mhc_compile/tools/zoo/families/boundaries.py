"""What cuts a model into pieces: graph breaks, checkpointing, no_grad, autograd functions, control flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_compile.tools.zoo.families.parts import WIDTH, FeedForward, vectors
from mhc_compile.tools.zoo.family import Case, Expected, Family, Mode, chains

__all__ = ["FAMILIES"]


class BreakInBranch(nn.Module):
    """A graph break in the middle of the branch: the add is one of two graph inputs, one of which the branch began at."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        torch._dynamo.graph_break()
        return x + self.down(h)


class BreakBetween(nn.Module):
    """A graph break behind every add: each graph has one."""

    def __init__(self) -> None:
        super().__init__()
        self.f = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        torch._dynamo.graph_break()
        return x


class BreakInMiddle(nn.Module):
    """One graph break in the middle of the network: a chain on either side."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.first, self.second = (nn.ModuleList(FeedForward() for _ in range(layers)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for mlp in self.first:
            x = x + mlp(x)
        torch._dynamo.graph_break()
        for mlp in self.second:
            x = x + mlp(x)
        return self.out(x)


class Checkpointed(nn.Module):
    """A block of two sites that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = FeedForward(), FeedForward()

    def _compute(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._compute, x, use_reentrant=False)


class CheckpointedBranch(Checkpointed):
    """Only the branch is computed again; the adds lie outside."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpoint(self.f, x, use_reentrant=False)
        return x + checkpoint(self.g, x, use_reentrant=False)


class FrozenHalf(nn.Module):
    """The first half runs under no_grad."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.first, self.second = (nn.ModuleList(FeedForward() for _ in range(layers)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.into(x)
            for mlp in self.first:
                x = x + mlp(x)
        for mlp in self.second:
            x = x + mlp(x)
        return self.out(x)


class Square(torch.autograd.Function):
    """`x²` with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class CustomFunction(nn.Module):
    """`x + square(f(x))`, the square an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.f = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + Square.apply(self.f(x))


class Autocast(nn.Module):
    """The branch runs under autocast to bfloat16; the trunk stays float32."""

    def __init__(self) -> None:
        super().__init__()
        self.f = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.f(x)
        return x + y.float()


class SkippedLayers(nn.Module):
    """LayerDrop by position: every second block is left out in training, which the tracer decides."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(FeedForward(8) for _ in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        for index, mlp in enumerate(self.mlps):
            if self.training and index % 2:
                continue
            x = x + mlp(x)
        return x


def _alone(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(pieces=(1,) * layers, note="a graph for each block; streams go on from one to the next")


def _skipped(layers: int, mode: Mode) -> Expected:
    return Expected((layers if mode == "train" else 2 * layers,), note="half of the layers are skipped in training")


def _network(network: nn.Module) -> Case:
    return network, (torch.randn(2, 5, 8),), {}


_ONE, _TWO = chains(lambda n: (n,)), chains(lambda n: (2 * n,))
_GROUP = "boundaries"
FAMILIES: tuple[Family, ...] = (
    Family("break-in-branch", _GROUP, vectors(BreakInBranch), _alone),
    Family("break-between", _GROUP, vectors(BreakBetween), _alone),
    Family("break-in-middle", _GROUP, lambda n: _network(BreakInMiddle(n)), chains(lambda n: (n, n))),
    Family("checkpointed", _GROUP, vectors(Checkpointed), _TWO),
    Family("checkpointed-branch", _GROUP, vectors(CheckpointedBranch), _TWO),
    Family("frozen-half", _GROUP, lambda n: _network(FrozenHalf(n)), _TWO),
    Family("autograd-function", _GROUP, vectors(CustomFunction), _ONE),
    Family(
        "autocast-branch", _GROUP, vectors(Autocast), _ONE, tolerance=5e-2, because="the branch computes in bfloat16"
    ),
    Family("skipped-layers", _GROUP, lambda n: _network(SkippedLayers(n)), _skipped),
)
