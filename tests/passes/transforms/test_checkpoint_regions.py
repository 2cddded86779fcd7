"""Regions of activation checkpointing: opened and closed again, whatever is written into them in
between.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.gates import scatter
from helpers.graphs import C, Model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_random_programs import distance, outcome, plain, programs, tolerance, updates
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile.compilation.inner_compiler import run_eagerly
from mhc_compile.passes.analysis.op_info import op_name, written_operands
from mhc_compile.passes.transforms.checkpoint_regions import (
    FIXED,
    PLACE,
    InlineRegions,
    Place,
    Region,
)
from mhc_compile.passes.transforms.outline_regions import OutlineRegions

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
mhc = torch.ops.mhc


class Regions(nn.Module):
    """`forward` is what a test makes it; `self.region(f, *operands)` is a checkpointed call.

    It stands between two other layers, as in a model: a chain that begins and ends with the graph
    would expect streams from other graphs.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(C, C), nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        self.before, self.behind = nn.Linear(C, C), nn.Linear(C, C)
        self.checkpointed = True
        self._forward = forward

    def region(self, f, *operands):
        return checkpoint(f, *operands, use_reentrant=False) if self.checkpointed else f(*operands)

    def forward(self, x):
        return self.behind(self._forward(self, self.before(x)))


def captured(model: nn.Module, *inputs: Tensor, backend: str | None = None) -> fx.GraphModule:
    """The graph of Dynamo, or with `backend="mhc"` what the inner compiler gets of it."""
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    options = {"options": {"inner_backend": keep, "min_chain_length": 1}} if backend else {}
    torch.compile(model, backend=backend or keep, **options)(*inputs)
    (graph,) = graphs
    return graph


def calls(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=CHECKPOINT)


def body_of(module: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    return getattr(module, call.args[0].target)


def names(graph: fx.Graph) -> list[str]:
    return [op_name(node) for node in graph.nodes if op_name(node) not in {"", "getitem"}]


def text(module: fx.GraphModule) -> str:
    return "\n".join(str(m.graph) for m in module.modules() if isinstance(m, fx.GraphModule))


def module_of(graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(graph.owning_module, graph)


def sublayers(m, x):
    for branch in (m.f, m.g):
        x = m.region(lambda x, branch=branch: x + branch(m.norm(x)), x)
    return m.norm(x)


X = torch.randn(2, 4, C)


def test_opening_gives_the_flat_graph_and_closing_the_regions():
    module = captured(Regions(sublayers), X)
    before = text(module)
    flat = InlineRegions().apply(module.graph)
    flat.lint()
    assert not calls(flat)
    assert names(flat)[1:-1] == [*["layer_norm", "linear", "add"] * 2, "layer_norm"]
    assert all("example_value" in node.meta for node in flat.nodes if node.op != "output")
    assert text(module) == before
    closed = module_of(OutlineRegions().apply(flat))
    closed.graph.lint()
    assert names(closed.graph) == names(module.graph)
    assert [names(body_of(closed, call).graph) for call in calls(closed.graph)] == [["layer_norm", "linear", "add"]] * 2
    assert [call.kwargs for call in calls(closed.graph)] == [call.kwargs for call in calls(module.graph)]
    assert not any(
        key in node.meta
        for m in closed.modules()
        if isinstance(m, fx.GraphModule)
        for node in m.graph.nodes
        for key in (PLACE, FIXED)
    )


def test_a_graph_without_regions_comes_back_as_it_is():
    graph = fx.symbolic_trace(Model(lambda m, x: x + m.f(x))).graph
    assert InlineRegions().apply(graph) is graph
    assert OutlineRegions().apply(graph) is graph


def test_streams_cross_the_boundary_and_nothing_else():
    model = Regions(sublayers)
    module = captured(model, X, backend="mhc")
    first, second = calls(module.graph)
    assert names(body_of(module, first).graph) == [
        *["unsqueeze", "expand", "coefficients", "collapse", "layer_norm", "linear", "update"],
    ]
    assert names(body_of(module, second).graph) == [
        "coefficients",
        "collapse",
        "layer_norm",
        "linear",
        "update",
        "mean",
    ]
    (between,) = first.users
    assert between.target is operator.getitem
    assert list(between.users) == [second]
    assert between.meta["example_value"].shape == (2, 4, 4, C)
    assert [tuple(value.shape) for value in second.meta["example_value"]] == [(2, 4, C)]


def test_a_hidden_state_is_computed_outside_where_the_streams_leave_anyway():
    def forward(m, x):
        first = m.region(lambda x: x + m.f(m.norm(x)), x)
        second = m.region(lambda x: x + m.g(m.norm(x)), first)
        return first * torch.sigmoid(second)

    module = captured(Regions(forward), X, backend="mhc")
    first, second = calls(module.graph)
    assert len(first.users) == len(second.users) == 1
    assert "mean" not in names(body_of(module, first).graph)
    assert names(body_of(module, second).graph)[-1] == "mean"
    assert names(module.graph).count("mean") == 1


def test_coefficients_go_where_the_branch_begins():
    """The add lies in a region, and its branch begins in front of it: the coefficients cannot lie
    in the region.
    """

    def forward(m, x):
        h = m.f(m.norm(x))
        return m.region(lambda x, h: x + m.g(torch.tanh(h)), x, h)

    module = captured(Regions(forward), X, backend="mhc")
    (call,) = calls(module.graph)
    assert "coefficients" in names(module.graph)
    assert names(body_of(module, call).graph) == ["tanh", "linear", "update", "mean"]


def test_a_site_may_span_two_regions():
    def forward(m, x):
        def first(x):
            x = x + m.g(m.norm(x))
            return x, m.f(m.norm(x))

        x, h = m.region(first, x)
        return m.region(lambda x, h: x + torch.tanh(h), x, h)

    module = captured(Regions(forward), X, backend="mhc")
    first, second = calls(module.graph)
    inside = names(body_of(module, first).graph)
    assert (inside.count("coefficients"), inside.count("collapse"), inside.count("update")) == (2, 2, 1)
    assert names(body_of(module, second).graph) == ["tanh", "update", "mean"]


def test_regions_in_regions_stay_nested():
    def forward(m, x):
        def outer(x):
            x = m.region(lambda x: x + m.f(m.norm(x)), x)
            return x + m.g(m.norm(x))

        return m.region(outer, x)

    module = captured(Regions(forward), X, backend="mhc")
    (outer,) = calls(module.graph)
    body = body_of(module, outer)
    (inner_backend,) = calls(body.graph)
    assert names(body_of(body, inner_backend).graph)[-1] == "update"
    assert names(body.graph) == [
        "tag_activation_checkpoint",
        *["coefficients", "collapse", "layer_norm", "linear"],
        *["update", "mean"],
    ]


def test_a_body_that_is_called_twice_is_written_twice():
    module = captured(Regions(lambda m, x: m.region(lambda x: x + m.f(m.norm(x)), x)), X)
    graph = module.graph
    (call,) = calls(graph)
    (result,) = call.users
    with graph.inserting_after(result):
        second = graph.call_function(CHECKPOINT, (call.args[0], result, *call.args[2:]), dict(call.kwargs))
        second.meta = dict(call.meta)
    with graph.inserting_after(second):
        final = graph.call_function(operator.getitem, (second, 0))
        final.meta = dict(result.meta)
    result.replace_all_uses_with(final, delete_user_cb=lambda user: user is not second)
    module.recompile()
    flat = InlineRegions().apply(graph)
    assert names(flat)[1:-1] == ["layer_norm", "linear", "add"] * 2
    adds = [node for node in flat.nodes if op_name(node) == "add"]
    adds[0].target = torch.sub  # from here on the two differ
    closed = module_of(OutlineRegions().apply(flat))
    one, other = calls(closed.graph)
    assert one.args[0].target != other.args[0].target
    assert [names(body_of(closed, call).graph)[-1] for call in (one, other)] == ["sub", "add"]


@pytest.mark.parametrize("change", ["kwargs", "whole result"])
def test_a_call_of_another_form_stays_a_call_and_is_reported(change):
    module = captured(Regions(lambda m, x: m.region(lambda x: x + m.f(m.norm(x)), x)), X)
    (call,) = calls(module.graph)
    if change == "kwargs":
        call.kwargs = {**call.kwargs, "debug": call.args[1]}
    else:
        (result,) = call.users
        result.replace_all_uses_with(call)
        module.graph.erase_node(result)
    assert InlineRegions().apply(module.graph) is module.graph
    from mhc_compile.passes.analysis.op_info import is_region

    assert [op_name(node) for node in module.graph.nodes if is_region(node)] == ["tag_activation_checkpoint"]


def test_graphs_of_other_operations_go_into_the_body_with_them():
    weight = torch.randn(C, C)

    @torch.compiler.nested_compile_region
    def inner_backend(x):
        return torch.tanh(x @ weight)

    def forward(m, x):
        x = m.region(lambda x: inner_backend(x) + 1, x)
        return m.region(lambda x: inner_backend(x) + x + m.f(m.norm(x)), x)

    module = captured(Regions(forward), X)
    flat = InlineRegions().apply(module.graph)
    flat.lint()
    assert names(flat).count("invoke_subgraph") == 2
    closed = module_of(OutlineRegions().apply(flat))
    for call in calls(closed.graph):
        assert "invoke_subgraph" in names(body_of(closed, call).graph)
    assert not any(op_name(node) == "invoke_subgraph" for node in closed.graph.nodes)


def test_autocast_keeps_its_place():
    """Nothing that rounds moves across the boundary of an autocast: the model and the rewritten
    graph switch at the same operations.
    """

    def forward(m, x):
        x = m.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = m.region(lambda x: x + m.f(m.norm(x)), x)
            h = m.g(x)
        x = x + h * 2
        with torch.autocast("cpu", torch.bfloat16):
            y = m.region(lambda x: x + m.f(x) + m.g(m.norm(x)), x)
        return m.norm(y)

    def sections(module: fx.GraphModule) -> list[Counter[str]]:
        """Operations between one switch of autocast and the next."""
        result = [Counter()]
        for name in names(InlineRegions().apply(module.graph)):
            if name in {"_enter_autocast", "_exit_autocast"}:
                result += [Counter({name: 1}), Counter()]
            elif name in {"linear", "layer_norm", "update", "add", "mul"}:
                result[-1]["sum" if name in {"update", "add"} else name] += 1
        return result

    model = Regions(forward)
    plain = copy.deepcopy(model)
    want, got = sections(captured(model, X)), sections(captured(model, X, backend="mhc"))
    assert sum(part["_enter_autocast"] for part in got) == 2
    assert got == want  # (x + f(x) + g(x): one sum of the branches and one update, as there were two adds)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager", "min_chain_length": 1})
    assert (compiled(X) - plain(X)).abs().max() < 2e-2


def test_a_trunk_computed_without_gradients_does_not_cut_the_gradients_of_the_coefficients():
    def forward(m, x):
        with torch.no_grad():
            x = m.norm(x)
        for branch in (m.f, m.g):
            x = m.region(lambda x, branch=branch: x + branch(torch.tanh(x)), x)
        return x

    for checkpointed in (True, False):
        torch._dynamo.reset()
        model = Regions(forward)
        model.checkpointed = checkpointed
        torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})(X).square().sum().backward()
        assert len(mhc_compile.connections(model)) == 2
        for name, connection in mhc_compile.connections(model).items():
            assert connection.phi.grad is not None, name
            assert connection.phi.grad.abs().max() > 0, name


# --- random programs
# --------------------------------------------------------------------------------------------------


def with_regions(traced: fx.GraphModule, switches: list[tuple[int, str]]) -> fx.GraphModule:
    """The same program with regions, one in another at most, opened and closed at the given
    operations.
    """
    body_graph = fx.Graph()
    body_graph.output(())
    host = fx.Graph()
    call = host.call_function(CHECKPOINT, (host.get_attr("wrap_body"),), {"use_reentrant": False})
    body = fx.GraphModule({}, body_graph)
    layout: list[Region | None] = [None]
    actions, position = dict(switches), 0
    for node in traced.graph.nodes:
        if node.op == "output":
            while layout[-1] is not None:
                layout.append(layout[-1].parent)
        elif node.op != "placeholder":
            action = actions.get(position)
            position += 1
            if action == "open" and (layout[-1] is None or layout[-1].parent is None):
                layout.append(Region(call, body, layout[-1]))
            elif action == "close" and layout[-1] is not None:
                layout.append(layout[-1].parent)
        node.meta.update({PLACE: Place(len(layout) - 1, layout), FIXED: True})
    module = module_of(OutlineRegions().apply(traced.graph))
    for node in traced.graph.nodes:
        del node.meta[PLACE], node.meta[FIXED]
    return module


switches = st.lists(st.tuples(st.integers(0, 16), st.sampled_from(["open", "open", "close"])), min_size=2, max_size=10)


def check(program, switches) -> tuple[int, int]:
    """Regions change neither what is found nor what is computed; returns the numbers of regions and
    of sites.
    """
    model, traced, x, (want, want_gradients) = plain(program)
    source = with_regions(traced, switches)
    options = {"min_chain_length": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhc_compile.export.rewrite.warn_nothing_rewritten", lambda *_: None)
        flat = mhc_compile.rewrite(traced, x, options=options)
        got = mhc_compile.rewrite(source, x, options=options)
        once = mhc_compile.rewrite(source, x)
        again = mhc_compile.rewrite(once, x)
    opened = module_of(InlineRegions().apply(got.graph))
    assert updates(opened) == updates(flat)

    def assert_close(one, other) -> None:
        for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
            assert distance(a, b) <= tolerance(program)

    assert_close(outcome(opened, model, x), (want, want_gradients))
    # Checkpointing computes a region twice, which no program with in-place operations survives:
    # there only the opened graph is run.
    if not any(written_operands(node) for node in traced.graph.nodes):
        assert text(again) == text(once)
        got = run_eagerly(got)  # torch's own way of running a region draws other dropout masks the second time
        assert_close(outcome(got, model, x), (want, want_gradients))
        parameters = dict(flat.named_parameters())
        scatter(got, 1.0)
        for name, parameter in got.named_parameters():
            if "mhc" in name:
                parameters[name].data.copy_(parameter.data)
        assert_close(outcome(got, model, x), outcome(flat, model, x))
    return len(calls(source.graph)), updates(flat)


common = {
    "deadline": None,
    "derandomize": True,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


def test_regions_of_random_programs():
    seen = []

    @settings(max_examples=15, **common)
    @given(programs, switches)
    def run(program, switches):
        seen.append(check(program, switches))

    run()
    assert sum(regions > 0 and sites > 0 for regions, sites in seen) > 3


@pytest.mark.slow
def test_regions_of_many_random_programs():
    settings(max_examples=400, **common)(given(programs, switches)(check_only))()


def check_only(program, switches) -> None:
    check(program, switches)
