"""Lowering: `mhc::` operators and spellings of Python become ATen, the numbers and the strides
hold, a second run changes nothing.
"""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.gates import scatter
from helpers.graphs import C, Model, trace
from torch import fx

import mhc_compile
from mhc_compile import ops
from mhc_compile.passes import run_passes
from mhc_compile.passes.analysis.op_info import op_name, tensor_value
from mhc_compile.passes.transforms.lower_to_aten import CanonicalizeAten, LowerOperators, RecomposeLayerNorms

aten = torch.ops.aten


def streams_of(forward, x=None, **options) -> tuple[fx.GraphModule, torch.Tensor]:
    """A graph on streams, in float64, with random hyper-connections."""
    x = torch.randn(2, 4, C, dtype=torch.float64) if x is None else x
    module = mhc_compile.rewrite(fx.symbolic_trace(Model(forward).double()), x, options=options)
    scatter(module, 1.0)
    return module, x


def two_sites(m, x):
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


def lowered(module: fx.GraphModule, *passes) -> fx.GraphModule:
    return fx.GraphModule(module, run_passes(module.graph, passes or (LowerOperators(),)))


def ours(graph: fx.Graph) -> Counter[str]:
    return Counter(op_name(n) for n in graph.nodes if getattr(n.target, "namespace", "") == "mhc")


def core(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op in {"call_function", "call_method"}]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mapping": "identity"},
        pytest.param({"streams": 1}, marks=pytest.mark.slow),
        {"streams": 3, "iterations": 2},
    ],
)
def test_operators_become_aten_and_the_numbers_hold(options):
    module, x = streams_of(two_sites, **options)
    assert ours(module.graph) == {"coefficients": 2, "collapse": 2, "update": 2}
    after = lowered(module)
    assert not ours(after.graph)
    want, got = module(x), after(x)
    assert (got - want).abs().max() < 1e-9
    parameters = dict(module.named_parameters())
    gradients = (torch.autograd.grad(out.square().sum(), parameters.values(), allow_unused=True) for out in (want, got))
    for name, one, other in zip(parameters, *gradients, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or (one - other).abs().max() < 1e-9 * max(1, one.abs().max().item()), name


def test_operators_inside_operators_are_lowered_and_the_table_decides():
    module, _ = streams_of(two_sites)
    kept = LowerOperators(ops.fused_decompositions()).apply(module.graph)
    assert ours(kept) == {"sinkhorn": 2}
    assert not ours(LowerOperators().apply(kept))
    assert ours(LowerOperators({}).apply(module.graph)) == ours(module.graph)


def test_iterations_are_unrolled():
    def divisions(iterations: int) -> int:
        module, _ = streams_of(two_sites, iterations=iterations)
        return core(lowered(module).graph).count("aten.div.Tensor")

    assert [divisions(n) for n in (1, 2, 5)] == [0, 4, 16]  # two sites, columns and rows


def test_results_have_the_strides_that_the_operator_promises():
    """Sinkhorn works with the tokens last, and gives the matrices back contiguous: a view after it
    may count on that.
    """
    module = trace(lambda m, x: torch.ops.mhc.sinkhorn(x[..., :4], 3))
    after = lowered(module)
    name = next(n.name for n in module.graph.nodes if op_name(n) == "sinkhorn")
    result = next(n for n in after.graph.nodes if n.name == name)
    assert tensor_value(result).is_contiguous()
    x = torch.randn(2, 4, C)
    assert after(x).is_contiguous()
    assert torch.allclose(after(x), module(x), atol=1e-6)


def test_everything_else_stays_as_it_is():
    module = trace(lambda m, x: aten.layer_norm.default(x + m.f(x), [C]))
    other = {aten.layer_norm.default: lambda *_: 1 / 0}  # a table may say more than what is ours
    for step in (LowerOperators({**ops.decompositions(), **other}), RecomposeLayerNorms()):
        assert str(step.apply(module.graph)) == str(module.graph)


def test_provenance_and_example_values():
    module, _ = streams_of(two_sites)
    after = lowered(module)
    sizes = {n.name: tensor_value(n).shape for n in module.graph.nodes if op_name(n) == "update"}
    assert {n.name: tensor_value(n).shape for n in after.graph.nodes if n.name in sizes} == sizes
    assert all(n.meta.get("example_value") is not None for n in after.graph.nodes if "aten." in str(n.target))


def test_a_second_run_changes_nothing_and_the_input_is_not_mutated():
    module, _ = streams_of(two_sites)
    text = str(module.graph)
    once = run_passes(module.graph, (LowerOperators(), CanonicalizeAten()))
    assert str(module.graph) == text
    assert str(once) != text
    assert str(run_passes(once, (LowerOperators(), CanonicalizeAten()))) == str(once)


def test_functions_and_methods_become_aten():
    def forward(m, x):
        y = torch.add(x, m.vector).movedim(1, -1).contiguous()
        y = y.reshape(-1, y.size(-1)).unsqueeze(-2).expand(-1, 2, -1).mean(-2)
        left, right = torch.split(y, 1, -1)[0], y.chunk(2, 0)[1]
        return F.gelu(left).flatten(0, 1), right, torch.clone(x)

    module = trace(forward)
    after = lowered(module, CanonicalizeAten())
    assert any(n.op == "call_method" for n in module.graph.nodes)
    assert {n.op for n in after.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    functions = [n.target for n in after.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    assert {getattr(target, "namespace", "") for target in functions} == {"aten"}
    assert core(after.graph)[0] == "aten.add.Tensor"
    x = torch.randn(2, 4, C)
    for one, other in zip(after(x), module(x), strict=True):
        assert torch.equal(one, other)


def test_spelling_goes_down_to_the_operations_of_a_table():
    module = trace(lambda m, x: torch.logsumexp(x, -1))
    table = dict(torch.export.default_decompositions())
    assert core(CanonicalizeAten().apply(module.graph)) == ["aten.logsumexp.default"]
    after = lowered(module, CanonicalizeAten(table))
    assert "aten.amax.default" in core(after.graph)
    x = torch.randn(2, 4, C)
    assert torch.allclose(after(x), module(x))


def test_replacement_keeps_the_name_of_its_node():
    module = trace(lambda m, x: torch.sigmoid(torch.add(x, x) * m.vector))
    names = [n.name for n in module.graph.nodes]
    assert [n.name for n in CanonicalizeAten().apply(module.graph).nodes] == names


def norms(between):
    """A decomposed layer norm, as `run_decompositions` writes it."""

    def forward(m, x):
        packed = aten.native_layer_norm.default(x, [C], m.vector, m.vector, 1e-5)
        return between(packed)

    return trace(forward)


def test_a_decomposed_layer_norm_is_raised_and_comes_back():
    module = norms(lambda packed: packed[0] * 2)
    raised = lowered(module, RecomposeLayerNorms())
    assert [op_name(n) for n in raised.graph.nodes if n.op == "call_function"] == ["layer_norm", "mul"]
    back = lowered(raised, CanonicalizeAten())
    assert [op_name(n) for n in back.graph.nodes if n.op == "call_function"] == ["native_layer_norm", "getitem", "mul"]
    x = torch.randn(2, 4, C)
    assert torch.equal(raised(x), module(x))
    assert torch.equal(back(x), module(x))


@pytest.mark.parametrize("between", [lambda packed: packed[0] * packed[1], lambda packed: packed[2]])
def test_a_layer_norm_whose_statistics_are_read_stays(between):
    module = norms(between)
    assert str(RecomposeLayerNorms().apply(module.graph)) == str(module.graph)
