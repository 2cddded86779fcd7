"""RecomputeSteps: the marks, and what the partitioners make of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.gates import scatter
from helpers.graphs import Model
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

import mhc_compile
from mhc_compile.passes.transforms.fuse_sites import FuseSites
from mhc_compile.passes.transforms.recompute import RecomputeSteps, block_length

STEP = torch.ops.mhc.step.default


def test_block_length_is_the_papers():
    assert [block_length(sites, 4) for sites in (1, 2, 8, 24, 60)] == [1, 1, 2, 4, 6]
    # What it minimises, for 60 sites: the streams kept, and those of one block while it is computed
    # again.
    cost = {length: 4 * 60 / length + (4 + 2) * length for length in range(1, 61)}
    assert min(cost, key=cost.__getitem__) in (block_length(60, 4), block_length(60, 4) + 1)
    assert math.isclose(math.sqrt(4 * 60 / 6), 6.32, abs_tol=0.01)


def chain(sites: int, **options) -> fx.GraphModule:
    def forward(m, x):
        for _ in range(sites):
            x = x + m.f(m.norm(x))
        return x

    module = mhc_compile.rewrite(fx.symbolic_trace(Model(forward)), torch.randn(2, 4, 6), options=options)
    return fx.GraphModule(module, FuseSites().apply(module.graph))


def test_all_but_the_first_step_of_a_block_are_marked():
    module = chain(9)
    graph = RecomputeSteps().apply(module.graph)
    marks = [node.meta.get("recompute") for node in graph.nodes if node.target is STEP]
    kept, again = None, CheckpointPolicy.MUST_RECOMPUTE
    assert marks == [kept, again] * 4  # blocks of two sites
    blocks = [node.meta["ac_graph_id"] for node in graph.nodes if node.target is STEP and "recompute" in node.meta]
    assert blocks == [1, 2, 3, 4]
    for node in graph.nodes:
        if node.target is STEP:
            assert {user.meta.get("recompute") for user in node.users} == {node.meta.get("recompute")}
    assert not any("recompute" in node.meta for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("options", "target"),
    [({"preset": "deepseek-v4.1"}, "shifted_step"), ({"token_dependent": False}, "mix_read")],
)
def test_steps_with_known_weights_are_marked_alike(options, target):
    """The `mix_read` that ends a single pass writes no streams that are read."""
    graph = RecomputeSteps().apply(chain(9, **options).graph)
    marks = [
        node.meta.get("recompute") for node in graph.nodes if node.target is getattr(torch.ops.mhc, target).default
    ]
    assert marks == [None, CheckpointPolicy.MUST_RECOMPUTE] * 4
    assert sum("recompute" in node.meta for node in graph.nodes if "mhc" in str(node.target)) == 4


def test_short_chains_and_plain_graphs_are_unchanged():
    for module in (chain(2), fx.symbolic_trace(Model(lambda m, x: x + m.f(x)))):
        assert RecomputeSteps().apply(module.graph) is module.graph


class Deep(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize("inner_backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_keep_fewer_streams_and_the_same_gradients(inner_backend):
    depth, width, tokens = 12, 32, 64
    torch.manual_seed(0)
    model, x = Deep(depth, width).double(), torch.randn(1, tokens, width, dtype=torch.float64)
    mhc_compile.attach(model, x)
    scatter(model, 0.2)
    kept, gradients = {}, {}
    for recompute in ("none", "cheap", "block"):
        torch._dynamo.reset()
        one = copy.deepcopy(model)
        compiled = torch.compile(one, backend="mhc", options={"inner_backend": inner_backend, "recompute": recompute})
        compiled(x).square().sum().backward()  # compiles
        one.zero_grad()
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = compiled(x)
        out.square().sum().backward()
        kept[recompute] = sum(sizes.values())
        gradients[recompute] = [p.grad for p in one.parameters()]
    streams = 4 * width * tokens * 8  # bytes of one set of streams
    # Chains of 12 sites have blocks of 3: of the 11 steps the 1st, 4th, 7th and 10th keep their
    # streams. With lazy streams the 4th, the 8th and the last do, whose streams leave the graph.
    assert kept["none"] - kept["block"] >= 7 * streams
    assert kept["none"] - kept["cheap"] >= 8 * streams - 0.01 * kept["none"]
    for other in ("none", "block"):
        for one, two in zip(gradients["cheap"], gradients[other], strict=True):
            assert (one - two).abs().max() <= 1e-10 * (1 + one.abs().max())
