"""One spelling for every addition."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import C, trace
from torch import fx

from mhc_compile.passes import NormalizeAdds
from mhc_compile.passes.roles import ADDS, INPLACE_ADDS, op_name


def spellings(graph: fx.Graph) -> list[str]:
    return [op_name(node) for node in graph.nodes if op_name(node) in ADDS | INPLACE_ADDS]


def inplace(graph: fx.Graph) -> None:
    """Dynamo writes `x += y` as operator.iadd; symbolic_trace loses the statement, so the tests put it back."""
    for node in graph.nodes:
        if node.target is operator.add:
            node.target = operator.iadd


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.f(x),
        lambda m, x: torch.add(x, m.f(x)),
        lambda m, x: x.add(m.f(x)),
        lambda m, x: torch.add(x, other=m.f(x)),
        lambda m, x: m.f(x).add_(x),
        lambda m, x: x.__add__(m.f(x)),
    ],
)
def test_every_spelling_becomes_torch_add(forward):
    graph = trace(forward).graph
    after = NormalizeAdds().apply(graph)
    assert [n.target for n in after.nodes if op_name(n) == "add"] == [torch.add]
    assert spellings(after) == ["add"]


def test_iadd_becomes_add_where_nobody_can_tell():
    module = trace(lambda m, x: m.f(x) + x)
    inplace(module.graph)
    assert spellings(module.graph) == ["iadd"]
    assert spellings(NormalizeAdds().apply(module.graph)) == ["add"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.f(x),  # writes into the caller's tensor
        lambda m, x: ((y := m.f(x)) + x, y)[0] + y,  # y is read after it was written
        lambda m, x: m.f(x).view(-1, C) + m.g(x).view(-1, C),  # writes into a view
    ],
)
def test_an_inplace_add_that_could_be_seen_keeps_its_spelling(forward):
    module = trace(forward)
    inplace(module.graph)
    assert "iadd" in spellings(NormalizeAdds().apply(module.graph))


def test_a_second_write_keeps_its_spelling_where_the_result_of_the_first_is_read():
    """`a = y.add_(x); b = y.add_(x)`: `a` and `b` are one tensor."""
    module = trace(lambda m, x: ((y := m.f(x)), (a := y.add_(x)), y.add_(x) * torch.sigmoid(a))[2])
    after = fx.GraphModule(module, NormalizeAdds().apply(module.graph))
    assert "add_" in spellings(after.graph)
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x), atol=1e-6)


def test_alpha_becomes_a_product_and_the_numbers_hold():
    module = trace(lambda m, x: torch.add(x, m.f(x), alpha=3))
    after = fx.GraphModule(module, NormalizeAdds().apply(module.graph))
    assert [op_name(n) for n in after.graph.nodes if n.op == "call_function"] == ["mul", "add"]
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x), atol=1e-6)


def test_numbers_and_the_input_graph_are_left_alone():
    module = trace(lambda m, x: m.f(x) + 1e-5)
    before = str(module.graph)
    after = NormalizeAdds().apply(module.graph)
    assert str(module.graph) == before
    assert [n.target for n in after.nodes if op_name(n) == "add"] == [operator.add]


def test_a_second_run_changes_nothing():
    graph = NormalizeAdds().apply(trace(lambda m, x: torch.add(x, m.f(x), alpha=2).add_(m.g(x))).graph)
    assert str(NormalizeAdds().apply(graph)) == str(graph)
