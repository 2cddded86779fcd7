"""Models in pieces: graph breaks, checkpointing, no_grad, autograd functions, control flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mhc_compile import _torch

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, Block, Each, FeedForward, Square, network, spelled, vectors,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Expected, Family, Mode, per_layer

__all__ = ["FAMILIES"]

_MLPS = Each(FeedForward)


class BreakInBranch(Block, up=Square, down=Square):
    """A graph break in the middle of the branch: its start and its add are in different graphs."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        _torch.graph_break()
        return x + self.down(h)


class BreakBetween(Block, f=FeedForward):
    """A graph break after every add: each graph has one."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        _torch.graph_break()
        return x


class BreakInMiddle(Block, into=INTO, out=OUT, first=_MLPS, second=_MLPS):
    """One graph break in the middle of the network: a chain on either side."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for mlp in self.first:
            x = x + mlp(x)
        _torch.graph_break()
        for mlp in self.second:
            x = x + mlp(x)
        return self.out(x)


class Checkpointed(Block, f=FeedForward, g=FeedForward):
    """A block of two sites that is computed again in the backward pass."""

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


class FrozenHalf(Block, into=INTO, out=OUT, first=_MLPS, second=_MLPS):
    """The first half runs under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.into(x)
            for mlp in self.first:
                x = x + mlp(x)
        for mlp in self.second:
            x = x + mlp(x)
        return self.out(x)


class Squared(torch.autograd.Function):
    """`x²` with a backward written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Autocast(Block, f=FeedForward):
    """The branch runs under autocast to bfloat16; the trunk stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.f(x)
        return x + y.float()


class SkippedLayers(Block, mlps=Each(lambda: FeedForward(8), lambda n: 2 * n)):
    """LayerDrop by position: training skips every second block, which the tracer decides."""

    def forward(self, x: Tensor) -> Tensor:
        for index, mlp in enumerate(self.mlps):
            if self.training and index % 2:
                continue
            x = x + mlp(x)
        return x


def _alone(layers: int, _mode: Mode) -> Expected:
    return Expected(pieces=(1,) * layers, note="a graph for each block; streams go on from one to the next")


def _skipped(layers: int, mode: Mode) -> Expected:
    return Expected((layers if mode == "train" else 2 * layers,), note="half of the layers are skipped in training")


_ONE, _TWO = per_layer(1), per_layer(2)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "boundaries": (
        Family("break-in-branch", vectors(BreakInBranch), _alone),
        Family("break-between", vectors(BreakBetween), _alone),
        Family("break-in-middle", network(BreakInMiddle), per_layer(1, 1)),
        Family("checkpointed", vectors(Checkpointed), _TWO),
        Family("checkpointed-branch", vectors(CheckpointedBranch), _TWO),
        Family("frozen-half", network(FrozenHalf), _TWO),
        spelled("autograd-function", "`x + square(f(x))`, the square an autograd function.",
                lambda block, x: x + Squared.apply(block.f(x)), f=FeedForward),
        Family("autocast-branch", vectors(Autocast), _ONE, tolerance=5e-2, because="the branch computes in bfloat16"),
        Family("skipped-layers", network(SkippedLayers), _skipped),
    ),
}  # fmt: skip
