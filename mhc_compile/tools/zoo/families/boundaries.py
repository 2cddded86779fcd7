"""Models in pieces: graph breaks, checkpointing, no_grad, autograd functions, control flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mhc_compile import _torch

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, Block, Each, FeedForward, Square, spelled, vectors, wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Expected, Family, Mode, per_layer

_MLPS = Each(FeedForward)


def _break_in_branch(block: Any, x: Tensor) -> Tensor:
    """Break the graph inside the branch: its start and its add are in different graphs."""
    h = F.gelu(block.up(x))
    _torch.graph_break()
    return x + block.down(h)


def _break_between(block: Any, x: Tensor) -> Tensor:
    """Break the graph after every add: each graph has one."""
    x = x + block.f(x)
    _torch.graph_break()
    return x


def _break_in_middle(net: Any, x: Tensor) -> Tensor:
    """One graph break in the middle of the network: a chain on either side."""
    x = net.into(x)
    for mlp in net.first:
        x = x + mlp(x)
    _torch.graph_break()
    for mlp in net.second:
        x = x + mlp(x)
    return net.out(x)


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


def _frozen_half(net: Any, x: Tensor) -> Tensor:
    """Run the first half under no_grad."""
    with torch.no_grad():
        x = net.into(x)
        for mlp in net.first:
            x = x + mlp(x)
    for mlp in net.second:
        x = x + mlp(x)
    return net.out(x)


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


def _skipped_layers(net: Any, x: Tensor) -> Tensor:
    """LayerDrop by position: training skips every second block, which the tracer decides."""
    for index, mlp in enumerate(net.mlps):
        if net.training and index % 2:
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
        spelled("break-in-branch", _break_in_branch, expected=_alone, up=Square, down=Square),
        spelled("break-between", _break_between, expected=_alone, f=FeedForward),
        wired("break-in-middle", _break_in_middle, expected=per_layer(1, 1), into=INTO, out=OUT, first=_MLPS,
              second=_MLPS),
        Family("checkpointed", vectors(Checkpointed), _TWO),
        Family("checkpointed-branch", vectors(CheckpointedBranch), _TWO),
        wired("frozen-half", _frozen_half, expected=_TWO, into=INTO, out=OUT, first=_MLPS, second=_MLPS),
        spelled("autograd-function", lambda block, x: x + Squared.apply(block.f(x)),
                doc="`x + square(f(x))`, the square an autograd function.", f=FeedForward),
        Family("autocast-branch", vectors(Autocast), _ONE, tolerance=5e-2, because="the branch computes in bfloat16"),
        wired("skipped-layers", _skipped_layers, expected=_skipped,
              mlps=Each(lambda: FeedForward(8), lambda n: 2 * n)),
    ),
}  # fmt: skip
