"""FuseSites: it fires, it stays away, the numbers hold, a second run changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.gates import scatter
from helpers.graphs import C, Model
from torch import fx

import mhc_compile
from mhc_compile.passes.analysis.op_info import op_name, tensor_value
from mhc_compile.passes.core.emit import is_copies
from mhc_compile.passes.core.pass_base import copy_graph
from mhc_compile.passes.transforms.fuse_sites import FuseSites

OURS = {"read", "step", "shifted_step", "mix_read", "close", "coefficients", "collapse", "update", "expand", "mean"}
SINGLE_PASS, STATIC = {"preset": "deepseek-v4.1"}, {"token_dependent": False}


def fused(forward, **options) -> tuple[fx.GraphModule, fx.GraphModule, torch.Tensor]:
    """The rewritten module with random parameters, the same with fused operators, and an input."""
    torch.manual_seed(0)
    model, x = Model(forward).double(), torch.randn(2, 4, C, dtype=torch.float64)
    module = mhc_compile.rewrite(fx.symbolic_trace(model), x, options={"min_chain_length": 1, **options})
    scatter(module, 0.3)
    graph = FuseSites().apply(module.graph)
    graph.lint()
    return module, fx.GraphModule(module, graph), x


def operations(module: fx.GraphModule) -> dict[str, int]:
    counts = Counter(op_name(node) for node in module.graph.nodes)
    return {name: counts[name] for name in OURS if counts[name]}


def assert_equal(module, other, x) -> None:
    parameters = dict(module.named_parameters())
    assert parameters.keys() == dict(other.named_parameters()).keys()
    results = []
    for one in (module, other):
        out = one(x)
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)])
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None and one.numel():
            assert (one - two).abs().max() <= 1e-11 * max(1.0, one.abs().max().item())


def sites(*branches):
    def forward(m, x):
        for branch in branches:
            x = x + getattr(m, branch)(m.norm(x))
        return m.norm(x)

    return forward


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_chain_is_one_read_steps_and_one_close(count):
    module, after, x = fused(sites(*"fgfgf"[:count]))
    before = operations(module)
    assert (before["coefficients"], before["update"], before["expand"], before["mean"]) == (count, count, 1, 1)
    steps = {"step": count - 1} if count > 1 else {}
    assert operations(after) == {"read": 1, "close": 1, **steps}
    assert_equal(module, after, x)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    ("options", "first", "inner", "last"),
    [
        (SINGLE_PASS, {"coefficients": 1}, "shifted_step", "mix_read"),
        (STATIC, {"coefficients": 1, "collapse": 1}, "mix_read", "close"),
        ({**SINGLE_PASS, **STATIC}, {"coefficients": 1}, "mix_read", "mix_read"),
    ],
)
def test_weights_that_are_known_before_make_one_operator_a_site(options, first, inner, last, count):
    module, after, x = fused(sites(*"fgfgf"[:count]), **options)
    static = options.get("token_dependent") is False  # computed outside of the operators
    wanted = Counter({"expand": 1, **first, last: 1}) + Counter({inner: count - 1})
    assert operations(after) == wanted + Counter({"coefficients": (count - 1) * static})
    assert_equal(module, after, x)
    steps = [node for node in after.graph.nodes if op_name(node) in {"shifted_step", "mix_read"}]
    assert [tensor_value(node.args[0]).shape[-2] for node in steps] == [1, 4, 4, 4, 4][: len(steps)]
    assert len(FuseSites().apply(after.graph).nodes) == len(after.graph.nodes)


def test_hidden_states_are_read_out_next_to_operators_with_known_weights():
    def forward(m, x):
        first = x + m.f(x)
        return first, first + m.g(first)

    for options, inner, last in ((SINGLE_PASS, "shifted_step", "mix_read"), (STATIC, "mix_read", "close")):
        module, after, x = fused(forward, **options)
        counts = operations(after)
        assert (counts[inner], counts[last], counts["mean"]) == (1, 1, 1)
        assert_equal(module, after, x)


def test_a_norm_after_the_add_keeps_the_collapse_by_the_weights_before():
    def forward(m, x):
        for branch in (m.f, m.g, m.f):
            x = m.norm(x + branch(x))
        return x

    module, after, x = fused(forward, **SINGLE_PASS)
    counts = operations(after)
    assert (counts["update"], counts["coefficients"], counts["collapse"]) == (2, 3, 2)
    assert_equal(module, after, x)


def test_known_weights_of_a_mapping_without_kernels(monkeypatch):
    """Updates and collapses are fused; the coefficients are computed outside."""
    monkeypatch.setattr("mhc_compile.ops.is_fused", lambda mapping: False)
    module, after, x = fused(sites("f", "g"), **SINGLE_PASS)
    assert operations(after) == {"coefficients": 2, "mix_read": 2, "expand": 1}
    assert_equal(module, after, x)


def test_copies_are_never_written():
    _, after, _ = fused(sites("f", "g"))
    for node in after.graph.nodes:
        if op_name(node) in {"read", "step"}:
            assert tensor_value(node.args[0]).shape == (2, 4, 1, C)
        if op_name(node) == "close":
            assert tensor_value(node.args[0]).shape == (2, 4, 4, C)  # they differ, after the first site


def test_hidden_states_are_read_out_next_to_the_step():
    def forward(m, x):
        first = x + m.f(x)
        return first, first + m.g(first)

    module, after, x = fused(forward)
    assert operations(after) == {"read": 1, "step": 1, "close": 1, "mean": 1}
    assert_equal(module, after, x)


def test_norm_after_the_add_keeps_the_update():
    def forward(m, x):
        for branch in (m.f, m.g, m.f):
            x = m.norm(x + branch(x))
        return x

    module, after, x = fused(forward)
    counts = operations(after)
    assert (counts["read"], counts["update"], counts["close"]) == (3, 2, 1)
    assert "step" not in counts
    assert_equal(module, after, x)


#: Each mapping is a C++ library of its own, which takes seconds to build.
@pytest.mark.parametrize(
    "mapping",
    ["permutations", *(pytest.param(m, marks=pytest.mark.slow) for m in ("identity", "kronecker", "unconstrained"))],
)
def test_other_mappings_have_kernels_too(mapping):
    module, after, x = fused(sites("f", "g"), mapping=mapping)
    assert operations(after) == {"read": 1, "step": 1, "close": 1}
    assert_equal(module, after, x)


def test_other_mapping_is_unchanged(monkeypatch):
    monkeypatch.setattr("mhc_compile.ops.is_fused", lambda mapping: False)
    module, after, x = fused(sites("f", "g"))
    assert operations(after) == {"coefficients": 2, "collapse": 2, "update": 1, "close": 1, "expand": 1}
    assert_equal(module, after, x)


def test_a_reader_of_the_coefficients_keeps_them():
    module, _, x = fused(sites("f", "g"))
    graph = module.graph
    pre = next(node for node in graph.nodes if node.name.startswith("mhc_pre"))
    out = graph.output_node()
    out.args = ((out.args[0], pre),)
    module.recompile()
    after = fx.GraphModule(module, FuseSites().apply(graph))
    assert operations(after)["coefficients"] == 1
    assert_equal(module, after, x)


def test_a_switch_of_gradients_between_two_sites_keeps_them_apart():
    module, _, _ = fused(sites("f", "g"))
    graph = module.graph
    update = next(node for node in graph.nodes if op_name(node) == "update")
    with graph.inserting_after(update):
        graph.call_function(torch._C._set_grad_enabled, (True,))
    assert "step" not in operations(fx.GraphModule(module, FuseSites().apply(graph)))


def test_a_second_run_and_a_plain_graph_change_nothing():
    _, after, _ = fused(sites("f", "g"))
    assert FuseSites().apply(after.graph) is after.graph
    plain = fx.symbolic_trace(Model(lambda m, x: x + m.f(x))).graph
    assert FuseSites().apply(plain) is plain


def test_the_input_is_not_mutated():
    module, _, _ = fused(sites("f", "g"))
    text = str(module.graph)
    FuseSites().apply(module.graph)
    assert str(module.graph) == text


def renamed(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have other names."""
    copy, _ = copy_graph(graph)
    for number, node in enumerate(copy.nodes):
        if node.op.startswith("call"):
            node.name = f"n{number}"
    return copy


def test_copies_are_known_by_their_mark_not_by_their_name():
    module, other, x = fused(sites("f", "g"))
    assert operations(other).get("expand") is None
    again = fx.GraphModule(module, FuseSites().apply(renamed(module.graph)))
    assert operations(again) == operations(other)
    assert_equal(module, again, x)


def test_an_expanded_value_of_the_model_is_no_copy():
    module, _, x = fused(sites("f", "g"))
    graph, _ = copy_graph(module.graph)
    (copies,) = [node for node in graph.nodes if is_copies(node)]
    del copies.meta["mhc_role"]
    assert copies.name.startswith("mhc_streams")
    again = fx.GraphModule(module, FuseSites().apply(graph))
    assert operations(again)["expand"] == 1
    assert_equal(module, again, x)
