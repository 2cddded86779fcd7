"""Graphs for the tests of passes, as `torch.fx.symbolic_trace` makes them, with example values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mhc_compile.passes import Plan, normalize, plan_chains
from mhc_compile.passes.analysis.provenance import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable

C = 6


class Model(nn.Module):
    """Two linear layers, a norm and parameters of its own; `forward` is what a test makes it."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.f = nn.Linear(C, C)
        self.g = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.before = nn.ZeroPad2d((0, 0, 1, -1))
        self.batch_norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.randn(C, C))
        self.vector = nn.Parameter(torch.randn(C))
        self.register_buffer("rows", torch.ones(4))
        self.register_buffer("zeros", torch.zeros(4))
        self._forward = forward

    def norm_f(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (C,), self.vector)

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def trace(forward: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """A graph module whose nodes have example values. The input is [2, 4, C] unless given."""
    module = fx.symbolic_trace(Model(forward))
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*(inputs or (torch.randn(2, 4, C),)))
    return module


def planned(forward: Callable[..., Any], *inputs: torch.Tensor, min_chain_length: int = 1) -> Plan:
    return plan_chains(normalize(trace(forward, *inputs).graph), Provenance(), min_chain_length=min_chain_length)
