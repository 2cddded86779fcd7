"""FoldScales: which factors it moves, which stay, and the numbers."""

from __future__ import annotations

import pytest
import torch
from helpers.gates import scatter
from helpers.graphs import C, Model
from torch import fx

import mhc_compile
from mhc_compile.passes import run_passes
from mhc_compile.passes.analysis.op_info import PRODUCTS, QUOTIENTS, op_name
from mhc_compile.passes.transforms.fold_scales import FoldScales
from mhc_compile.passes.transforms.fuse_sites import FuseSites


def branch(m, x):
    return m.f(m.norm(x)).tanh()


FOLDED = {
    "a number": lambda m, x: 0.1 * branch(m, x),
    "a division": lambda m, x: branch(m, x) / 3,
    "a parameter": lambda m, x: branch(m, x) * m.vector[0],
    "a weight of every token": lambda m, x: branch(m, x) * x.mean(-1, keepdim=True).sigmoid(),
    "stochastic depth": lambda m, x: branch(m, x) / 0.9 * (m.rows[:2, None, None] * 0.5),
}
KEPT = {
    "a factor for every feature": lambda m, x: branch(m, x) * m.vector,
    "a product of two branches": lambda m, x: branch(m, x) * m.g(x),
    "a number by a branch": lambda m, x: 3 / (2 + branch(m, x)),
}


def folded(scaled):
    torch.manual_seed(0)

    def forward(m, x):
        for _ in range(3):
            x = x + scaled(m, x)
        return x

    model, x = Model(forward).double(), torch.randn(2, 4, C, dtype=torch.float64)
    module = mhc_compile.rewrite(fx.symbolic_trace(model), x, options={"min_chain_length": 1})
    scatter(module, 0.3)
    graph = FoldScales().apply(module.graph)
    graph.lint()
    return module, fx.GraphModule(module, graph), x


def scaled_branches(module):
    """How many updates take a product, and how many take weights that are one."""
    updates = module.graph.find_nodes(op="call_function", target=torch.ops.mhc.update.default)
    return [sum(op_name(node.args[at]) in PRODUCTS | QUOTIENTS for node in updates) for at in (1, 2)]


FAST = ("a parameter", "stochastic depth", "a factor for every feature")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*FOLDED, *KEPT)]
)
def test_factors(name):
    module, after, x = folded(FOLDED.get(name) or KEPT[name])
    before = scaled_branches(module)
    assert before == [3, 0]
    assert scaled_branches(after) == ([0, 3] if name in FOLDED else before)
    assert FoldScales().apply(after.graph) is after.graph
    assert len(after.graph.nodes) == len(module.graph.nodes)
    results, parameters = [], list(module.parameters())
    for one in (module, after, fx.GraphModule(after, run_passes(after.graph, (FuseSites(),)))):
        out = one(x)
        loss = (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        results.append([out, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one - other).abs().max() <= 1e-11 * max(1.0, one.abs().max().item())
