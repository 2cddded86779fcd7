"""LazyStreams: the rewrite of AOTAutograd's joint graphs, what they compute, what is kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Deep
from helpers.gates import scatter
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

import mhc_compile
from mhc_compile._torch import rewrite_joint_graphs
from mhc_compile.ops import cpu
from mhc_compile.passes.core.pass_base import copy_graph
from mhc_compile.passes.transforms.lazy_streams import LazyStreams

mhc = torch.ops.mhc


def apart(model):
    """Let the hyper-connections differ from their start, with which all streams are equal."""
    scatter(model, 0.4)
    return model


def joint(sites: int) -> fx.GraphModule:
    """The joint graph of a chain, with steps that all write their streams."""
    torch.manual_seed(0)
    graphs = []
    model, x = Deep(sites, 6).double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager", "recompute": "block"})
    with rewrite_joint_graphs(lambda graph: graphs.append(graph) or graph):
        compiled(x).sum().backward()
    for node in graphs[0].nodes:
        node.meta.pop("recompute", None)
    return fx.GraphModule(compiled._orig_mod, graphs[0])


def counts(graph: fx.Graph) -> Counter[str]:
    calls = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in calls if name.startswith("mhc."))


CHAIN = joint(7)  # six steps
CLOSES = {"read": 1, "read_backward": 1}


@pytest.mark.parametrize(
    ("length", "lazy"),
    [
        (2, {"lazy_step": 6, "lazy_step_backward": 3, "step_backward": 3, "close": 1, "close_backward": 1}),
        (3, {"lazy_step": 6, "lazy_step_backward": 4, "step_backward": 2, "close": 1, "close_backward": 1}),
        (4, {"lazy_step": 6, "lazy_step_backward": 4, "step_backward": 2, "lazy_close": 1, "lazy_close_backward": 1}),
    ],
)
def test_streams_are_written_at_every_length_th_step(length, lazy):
    before = CHAIN.graph.python_code("self").src
    after = LazyStreams(length).apply(CHAIN.graph)
    after.lint()
    assert counts(after) == {**CLOSES, **lazy}
    written = [node.args[7] for node in after.nodes if node.target is mhc.lazy_step.default]
    assert written == [(step + 1) % length == 0 for step in range(6)]
    sources = [len(node.args[1]) for node in after.nodes if node.target is mhc.lazy_step.default]
    assert sources == [step % length + 1 for step in range(6)]
    assert CHAIN.graph.python_code("self").src == before
    assert LazyStreams(length).apply(after) is after


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_graph_computes_the_same(length):
    inputs = [
        torch.randn_like(torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype))
        for node in CHAIN.graph.nodes
        if node.op == "placeholder"
    ]
    primals = sum("tangents" not in node.name for node in CHAIN.graph.nodes if node.op == "placeholder")
    given = inputs[:primals], inputs[primals:]
    want = CHAIN(*given)
    got = fx.GraphModule(CHAIN, LazyStreams(length).apply(CHAIN.graph))(*given)
    for one, other in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() <= 1e-11 * (1 + other.abs().max())


def test_graphs_in_which_nothing_can_stay_unwritten_are_unchanged(monkeypatch):
    assert LazyStreams(1).apply(CHAIN.graph) is CHAIN.graph
    plain = fx.symbolic_trace(Deep(2, 6)).graph
    assert LazyStreams().apply(plain) is plain
    monkeypatch.delitem(cpu.kernels._TYPES, (torch.float64, torch.float64))
    assert LazyStreams().apply(CHAIN.graph) is CHAIN.graph


@pytest.mark.parametrize("why", ["read otherwise", "computed again", "another dtype"])
def test_streams_are_written_for(why):
    graph, _ = copy_graph(CHAIN.graph)
    steps = graph.find_nodes(op="call_function", target=mhc.step.default)
    streams = next(user for user in steps[2].users if user.args[1] == 0)
    if why == "read otherwise":
        output = graph.output_node()
        output.args = ((*output.args[0], streams),)
    elif why == "computed again":
        steps[2].meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    else:
        steps[3].args[1].meta["val"] = steps[3].args[1].meta["val"].float()
    after = LazyStreams().apply(graph)
    assert sum(node.target is mhc.step.default for node in after.nodes) == (why != "read otherwise")
    kept = [node.args[7] for node in after.nodes if node.target is mhc.lazy_step.default]
    assert (
        kept
        == {
            "read otherwise": [False, False, True, False, False, False],
            "computed again": [False, True, False, False, False],
            "another dtype": [False, False, True, False, False],
        }[why]
    )


class Gpt(nn.Module):
    """Embeddings, causal attention and MLPs with pre-norms, a tied head."""

    def __init__(
        self, layers: int = 3, width: int = 32, heads: int = 2, vocabulary: int = 50, tokens: int = 24
    ) -> None:
        super().__init__()
        self.heads, self.embedding, self.positions = heads, nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )

    def attention(self, layer, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv[layer](x).chunk(3, -1))
        return self.out[layer](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, ids):
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        for layer, mlp in enumerate(self.mlp):
            x = x + self.attention(layer, self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        return F.linear(self.norms[-1](x), self.embedding.weight)


@pytest.mark.slow
@pytest.mark.parametrize("inner_backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch._functorch.config.patch(enable_autograd_cache=False)  # a graph from a cache is not rewritten again
def test_a_gpt_trains_as_in_eager_mode(inner_backend, dynamic):
    torch.manual_seed(0)
    model, graphs = Gpt().double(), []
    texts = [torch.randint(50, (2, length)) for length in (24, 17)]
    mhc_compile.attach(model, texts[0])
    apart(model)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": inner_backend}, dynamic=dynamic)
    for ids in texts:
        results = []
        for function in (compiled, mhc_compile.eager(model)):
            model.zero_grad()
            with rewrite_joint_graphs(lambda graph: graphs.append(counts(graph)) or graph):
                out = function(ids)
                F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            results.append((out, [p.grad.clone() for p in model.parameters()]))
        (out, gradients), (wanted, gradients_wanted) = results
        assert (out - wanted).abs().max() <= 1e-11 * wanted.abs().max()
        for one, other in zip(gradients, gradients_wanted, strict=True):
            assert (one - other).abs().max() <= 1e-9 * (1e-3 + other.abs().max())
    assert graphs
