"""One spelling for every addition."""

from __future__ import annotations

import operator

import pytest
import torch
from helpers.graphs import C, trace
from torch import fx

from mhc_compile.passes.analysis.op_info import ADDS, INPLACE_ADDS, op_name
from mhc_compile.passes.transforms.normalize_adds import NormalizeAdds


def spellings(graph: fx.Graph) -> list[str]:
    return [op_name(node) for node in graph.nodes if op_name(node) in ADDS | INPLACE_ADDS]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.f(x),
        lambda m, x: torch.add(x, m.f(x)),
        lambda m, x: x.add(m.f(x)),
        lambda m, x: torch.add(x, other=m.f(x)),
        lambda m, x: x.__add__(m.f(x)),
    ],
)
def test_every_spelling_becomes_torch_add(forward):
    graph = trace(forward).graph
    after = NormalizeAdds().apply(graph)
    assert [n.target for n in after.nodes if op_name(n) == "add"] == [torch.add]
    assert spellings(after) == ["add"]


def test_alpha_becomes_a_product_and_the_numbers_hold():
    module = trace(lambda m, x: torch.add(x, m.f(x), alpha=3))
    after = fx.GraphModule(module, NormalizeAdds().apply(module.graph))
    assert [op_name(n) for n in after.graph.nodes if n.op == "call_function"] == ["mul", "add"]
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x), atol=1e-6)


def test_a_difference_of_equal_shapes_becomes_an_addition():
    module = trace(lambda m, x: torch.sub(x - m.f(x), m.g(x), alpha=2) - x.mean(-1, keepdim=True))
    after = fx.GraphModule(module, NormalizeAdds().apply(module.graph))
    assert spellings(after.graph) == ["add", "add"]
    assert [op_name(node) for node in after.graph.nodes].count("sub") == 1
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x), atol=1e-6)


@pytest.mark.parametrize("value", [1, 0.5])
def test_addcmul_becomes_a_product_and_an_addition(value):
    module = trace(lambda m, x: torch.addcmul(x, m.vector, m.f(x), value=value))
    after = fx.GraphModule(module, NormalizeAdds().apply(module.graph))
    assert spellings(after.graph) == ["add"]
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x), atol=1e-6)


def test_additions_of_numbers_and_the_input_graph_are_unchanged():
    module = trace(lambda m, x: m.f(x) + 1e-5)
    before = str(module.graph)
    after = NormalizeAdds().apply(module.graph)
    assert str(module.graph) == before
    assert [n.target for n in after.nodes if op_name(n) == "add"] == [operator.add]


def test_a_second_run_changes_nothing():
    graph = NormalizeAdds().apply(trace(lambda m, x: torch.add(x, m.f(x), alpha=2).add(m.g(x))).graph)
    assert str(NormalizeAdds().apply(graph)) == str(graph)
