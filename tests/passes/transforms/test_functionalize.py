"""In-place operations become ordinary ones where nobody can tell, and stay where somebody could."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import C, trace
from torch import fx, nn

from mhc_compile.passes.analysis.op_info import written_operands
from mhc_compile.passes.transforms.functionalize import FunctionalizeWrites


def inplace(module: fx.GraphModule) -> fx.GraphModule:
    """Dynamo writes `x += y` as operator.iadd; symbolic_trace writes operator.add, so the tests say
    what Dynamo would.
    """
    for node in module.graph.nodes:
        if node.target is operator.add:
            node.target = operator.iadd
    module.recompile()
    return module


def writes(graph: fx.Graph) -> int:
    return sum(bool(written_operands(node)) for node in graph.nodes)


def functionalized(module: fx.GraphModule) -> fx.GraphModule:
    graph = FunctionalizeWrites().apply(module.graph)
    graph.lint()
    return fx.GraphModule(module, graph)


def same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    x = torch.randn(2, 4, C)
    mine, theirs = x.clone(), x.clone()
    assert torch.allclose(one(mine), other(theirs), atol=1e-6)
    assert torch.allclose(mine, theirs)  # what was written into the caller's tensor


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.f(x).add_(x),
        lambda m, x: ((y := m.f(x)), y.add_(x), m.g(y))[2],  # a statement: the later reader names the old value
        lambda m, x: ((y := m.f(x)), y.add_(x), y.mul_(2), y.relu_(), y + x)[4],
        lambda m, x: ((y := m.f(x)), (a := y.add_(x)), y.add_(x) * torch.sigmoid(a))[2],  # `a` and `y` are one tensor
        lambda m, x: ((y := m.f(x)), F.relu(y, inplace=True), y * 2)[2],
        lambda m, x: ((y := m.f(x)), F.leaky_relu(y, 0.3, True), y * 2)[2],
        lambda m, x: ((y := m.f(x)), F.relu_(y), y * 2)[2],
        lambda m, x: ((y := m.f(x)), y.clamp_(min=0.1), y)[2],
        lambda m, x: ((y := m.f(x)), y.masked_fill_(x > 0, 1.0), y)[2],
        lambda m, x: ((y := m.f(x)), torch.ops.aten.add_.Tensor(y, x), y)[2],
        lambda m, x: ((y := m.f(x)), (v := y.view(-1, C)), v.add_(1.0), v * 2)[3],  # a view that is the only name read
        lambda m, x: ((y := m.f(x)), y.view(-1), y.add_(x), y)[3],  # a view that nobody reads any more
        lambda m, x: ((y := m.f(x).bfloat16()), y.add_(x), y.float())[2],  # the write rounds to the dtype of the tensor
    ],
)
def test_unobservable_writes_become_ordinary_operations(forward):
    module = trace(forward)
    assert writes(module.graph) > 0
    after = functionalized(module)
    assert writes(after.graph) == 0
    same(after, module)


def test_iadd_becomes_add():
    module = inplace(trace(lambda m, x: m.f(x) + x))
    assert writes(module.graph) == 1
    after = functionalized(module)
    assert writes(after.graph) == 0
    same(after, module)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: ((y := m.f(x)), (v := y.view(-1, C)), y.add_(1.0), v * 2)[
            3
        ],  # a view taken before is read afterwards
        lambda m, x: ((y := m.f(x)), y[:, 0].add_(1.0), y * 2)[2],  # a write to a part
        lambda m, x: ((d := m.f(x).detach()), (y := d.detach()), y.add_(1.0), d * 2)[3],  # the gradient would change
        lambda m, x: (x.relu_(), x * 2)[1],  # the caller's tensor, no addition
    ],
)
def test_observable_writes_keep_their_spelling(forward):
    module = trace(forward)
    after = functionalized(module)
    assert writes(after.graph) == writes(module.graph) == 1
    same(after, module)


def test_writes_without_gradients_keep_their_spelling():
    module = trace(lambda m, x: ((y := m.f(x)), y.add_(x), y * 2)[2])
    first = next(node for node in module.graph.nodes if written_operands(node))
    with module.graph.inserting_before(first):
        module.graph.call_function(torch._C._set_grad_enabled, (False,))
    with module.graph.inserting_after(first):
        module.graph.call_function(torch._C._set_grad_enabled, (True,))
    assert writes(FunctionalizeWrites().apply(module.graph)) == 1


def test_an_input_that_is_added_to_in_place_is_written_back():
    module = trace(lambda m, x: (x.add_(m.f(x)), x.mul_(2.0), m.g(x))[2])
    after = functionalized(module)
    assert [str(node.target) for node in after.graph.nodes if written_operands(node)] == ["copy_"]
    same(after, module)


def test_an_inplace_activation_module_becomes_its_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.act, self.slope = nn.Linear(C, C), nn.ReLU(inplace=True), nn.LeakyReLU(0.3, inplace=True)

        def forward(self, x):
            y = self.f(x)
            self.act(y)
            self.slope(y - 1)
            return y

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    module = fx.symbolic_trace(Net())
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(torch.randn(2, 4, C))
    after = functionalized(module)
    assert writes(module.graph) == 2
    assert writes(after.graph) == 0
    assert F.leaky_relu in [node.target for node in after.graph.nodes]
    same(after, module)


def test_input_graph_is_unchanged_and_a_second_run_changes_nothing():
    module = trace(lambda m, x: ((y := m.f(x)), y.add_(x), x.add_(m.g(y)))[2])
    before = str(module.graph)
    after = functionalized(module)
    assert str(module.graph) == before
    assert str(FunctionalizeWrites().apply(after.graph)) == str(after.graph)
