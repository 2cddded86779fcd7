"""CastReads: the rewrite of AOTAutograd's joint graphs under autocast, and what they compute."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Deep
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mhc_compile._torch import rewrite_joint_graphs
from mhc_compile.passes.analysis.op_info import cast_of
from mhc_compile.passes.core.pass_base import copy_graph
from mhc_compile.passes.transforms.cast_reads import CastReads
from mhc_compile.passes.transforms.lazy_streams import LazyStreams

mhc = torch.ops.mhc
SITES = 4


class Float(nn.Module):
    """What an embedding is under autocast: the trunk after it is float32."""

    def forward(self, x):
        return x.float()


def joint() -> fx.GraphModule:
    """The joint graph of a chain whose branches compute in bfloat16, as if on CUDA."""
    torch.manual_seed(0)
    graphs = []
    model, x = Deep(SITES, 6), torch.randn(2, 3, 6, requires_grad=True)
    model.before = nn.Sequential(model.before, Float())
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager", "recompute": "block"})
    with rewrite_joint_graphs(lambda graph: graphs.append(graph) or graph), torch.autocast("cpu", torch.bfloat16):
        compiled(x).sum().backward()
    graph, mode = graphs[0], FakeTensorMode()

    def moved(value):
        fits = isinstance(value, torch.Tensor)
        return FakeTensor(mode, torch.empty_like(value, device="meta"), torch.device("cuda")) if fits else value

    for node in graph.nodes:
        node.meta.pop("recompute", None)
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
    return fx.GraphModule(compiled._orig_mod, graph)


JOINT = joint()


def casts(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if cast_of(node) is not None]


def test_casts_of_h_and_of_its_gradient_are_part_of_the_operators():
    before = JOINT.graph.python_code("self").src
    after = CastReads().apply(JOINT.graph)
    after.lint()
    assert JOINT.graph.python_code("self").src == before
    assert CastReads().apply(after) is after
    # Of every site h, its gradient and nothing else: weights, and outputs of branches, are left.
    assert len(casts(JOINT.graph)) - len(casts(after)) == 2 * SITES
    reads = [node for node in after.nodes if "read_dtype" in node.kwargs]
    assert [node.target for node in reads] == [mhc.read.default, *[mhc.step.default] * (SITES - 1)]
    for node in reads:
        (h,) = (user for user in node.users if user.args[1] == (node.target is mhc.step.default))
        assert h.meta["val"].dtype == node.meta["val"][h.args[1]].dtype == torch.bfloat16
    for node in after.nodes:
        if node.target in (mhc.read_backward.default, mhc.step_backward.default):
            grad = node.args[node.target is mhc.step_backward.default]
            assert grad.meta["val"].dtype == torch.bfloat16


def test_the_graph_computes_the_same():
    graph = CastReads().apply(LazyStreams().apply(JOINT.graph))
    placeholders = [node for node in JOINT.graph.nodes if node.op == "placeholder"]
    torch.manual_seed(1)
    inputs = [torch.randn(node.meta["val"].shape).to(node.meta["val"].dtype) for node in placeholders]
    primals = sum("tangents" not in node.name for node in placeholders)
    given = inputs[:primals], inputs[primals:]
    want, got = JOINT(*given), fx.GraphModule(JOINT, graph)(*given)
    for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-2 * other.norm()  # kernels round other sums


def test_h_that_something_reads_uncast_stays():
    graph, _ = copy_graph(JOINT.graph)
    step = graph.find_nodes(op="call_function", target=mhc.step.default)[1]
    (h,) = (user for user in step.users if user.args[1] == 1)
    output = graph.output_node()
    output.args = ((*output.args[0], h),)
    after = CastReads().apply(graph)
    assert len([node for node in after.nodes if "read_dtype" in node.kwargs]) == SITES - 1
    assert len(casts(graph)) - len(casts(after)) == 2 * SITES - 1


def test_on_cpu_nothing_changes():
    """Its kernels write h in the dtype of the streams."""
    graph, _ = copy_graph(JOINT.graph)
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype)
    assert CastReads().apply(graph) is graph


def test_h_in_half_precision_is_rounded_before_it_is_cast():
    graph, _ = copy_graph(JOINT.graph)
    for node in graph.nodes:
        value = node.meta.get("val")
        if cast_of(node) is None and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            node.meta["val"] = value.half()
    after = CastReads().apply(graph)
    assert not [node for node in after.nodes if "read_dtype" in node.kwargs]


@pytest.mark.parametrize("target", [torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default])
def test_what_is_a_cast(target):
    graph, found = fx.Graph(), []
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    how = {"dtype": torch.half} if "_to_copy" in str(target) else {}
    for value in (x.meta["val"].half(), torch.empty(2, 3, dtype=torch.half, device="meta")):
        cast = graph.call_function(target, (x,) if how else (x, torch.half), how)
        cast.meta["val"] = value
        found.append(cast_of(cast))
    assert found == [torch.half, None]
    assert cast_of(x) is None
    cast.kwargs = {**how, "memory_format": torch.channels_last}
    cast.meta["val"] = x.meta["val"].half()
    assert cast_of(cast) is None
