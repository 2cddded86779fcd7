"""Activation checkpointing: the same sites, the same numbers, and the memory that it is there to
save.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import default_partition, make_boxed_func, min_cut_rematerialization_partition
from helpers.builders import Block, Case, Decoder, Run, assert_same, build, relative, run, tokens, twin, without_dropout
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mhc_compile

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS = 2
WIDTH = 8
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Checkpointed(Decoder):
    """A decoder that runs its blocks as `how` says; `how(call, blocks, x)` calls `call(f,
    *operands)` where a region is wanted.
    """

    def __init__(
        self, how: Callable[..., Any], *, layers: int = LAYERS, reentrant: bool = False, **settings: Any
    ) -> None:
        super().__init__(WIDTH, layers)
        self.how, self.reentrant, self.settings = how, reentrant, settings
        self.on = True

    def region(self, f, *operands):
        if not self.on:
            return f(*operands)
        return checkpoint(f, *operands, use_reentrant=self.reentrant, **self.settings)

    def forward(self, tokens):
        return self.head(self.norm(self.how(self.region, self.blocks, self.embed(tokens))))


def every_block(call, blocks, x):
    for block in blocks:
        x = call(block, x)
    return x


def every_branch(call, blocks, x):
    for block in blocks:
        x = x + call(lambda x, block=block: block.attn(block.norm1(x)), x)
        x = x + call(lambda x, block=block: block.mlp(block.norm2(x)), x)
    return x


def every_second_block(call, blocks, x):
    for number, block in enumerate(blocks):
        x = block(x) if number % 2 else call(block, x)
    return x


def all_blocks_in_one(call, blocks, x):
    return call(lambda x: every_block(lambda block, x: block(x), blocks, x), x)


def regions_in_a_region(call, blocks, x):
    return call(lambda x: every_second_block(call, blocks, x), x)


def hidden_states(call, blocks, x):
    total = 0
    for block in blocks:
        x = call(block, x)
        total = total + torch.tanh(x)
    return x * torch.sigmoid(total)


def hidden_states_of_the_middle(call, blocks, x):
    def both(x, block):
        y = x + block.attn(block.norm1(x))
        return y + block.mlp(block.norm2(y)), y

    total = 1
    for block in blocks:
        x, y = call(both, x, block)
        total = total * torch.sigmoid(y)
    return x * total


def a_site_across_two_regions(call, blocks, x):
    def first(x, block):
        x = x + block.attn(block.norm1(x))
        return x, block.mlp(block.norm2(x))

    for block in blocks:
        x, h = call(first, x, block)
        x = call(lambda x, h: x + torch.tanh(h), x, h)
    return x


def a_norm_between_regions(call, blocks, x):
    def both(x, block):
        x = block.norm1(x + block.attn(x))
        return x + block.mlp(x)

    for block in blocks:
        x = block.norm2(call(both, x, block))
    return x


def a_region_that_nobody_reads(call, blocks, x):
    for block in blocks:
        call(lambda x, block=block: F.dropout(block.mlp(x), 0.5), x)
        x = call(lambda x, block=block: block(F.dropout(x, 0.1)), x)
    return x


def a_region_that_returns_its_operand(call, blocks, x):
    for block in blocks:
        y, x = call(lambda x, block=block: (block(x), x), x)
        x = y + 0 * x.sum()
    return x


def in_place(call, blocks, x):
    def both(x, block):
        x = x + block.attn(block.norm1(x)).relu_()
        h = block.mlp(block.norm2(x))
        h += x
        return h

    for block in blocks:
        x = call(both, x, block)
    return x


def dropout(call, blocks, x):
    def both(x, block):
        x = x + F.dropout(block.attn(block.norm1(x)), 0.3)
        return x + F.dropout(block.mlp(block.norm2(x)), 0.3)

    x = F.dropout(x, 0.2)
    for block in blocks:
        x = call(both, x, block)
        x = x + F.dropout(torch.tanh(block.mlp(x)), 0.2)
    return F.dropout(x, 0.1)


WAYS = (
    every_block,
    every_branch,
    every_second_block,
    all_blocks_in_one,
    regions_in_a_region,
    hidden_states,
    hidden_states_of_the_middle,
    a_site_across_two_regions,
    a_norm_between_regions,
    a_region_that_nobody_reads,
    a_region_that_returns_its_operand,
    in_place,
    dropout,
)


def step(call: Any, model: nn.Module, ids: Tensor) -> Run:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    logits = call(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return Run(
        logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    )


def pair(how: Callable[..., Any], **settings: Any) -> tuple[Checkpointed, Checkpointed]:
    """The model with checkpointing and the model without."""
    model = Checkpointed(how, **settings).double()
    off = twin(model)
    off.on = False
    return model, off


#: Ways whose outputs and gradients only slow tests compare, and the usual one.
SITES = (
    every_block,
    all_blocks_in_one,
    hidden_states_of_the_middle,
    a_norm_between_regions,
    every_branch,
    a_region_that_nobody_reads,
    a_region_that_returns_its_operand,
)


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how in SITES else pytest.mark.slow) for how in WAYS],
    ids=lambda how: how.__name__,
)
def test_the_sites_are_those_of_the_model_without_checkpointing(how):
    model, off = pair(how)
    got, want = (mhc_compile.explain(m, tokens(), options={"min_chain_length": 1}) for m in (model, off))
    assert [[site.path for site in chain.sites] for chain in got.chains] == [
        [site.path for site in chain.sites] for chain in want.chains
    ]
    assert got.reasons == want.reasons
    assert not got.regions
    assert got.cost == want.cost
    assert got.plain_flops_per_token == pytest.approx(want.plain_flops_per_token)


def test_one_chain_runs_through_all_blocks():
    explanation = mhc_compile.explain(Checkpointed(every_block), tokens())
    assert [len(chain.sites) for chain in explanation.chains] == [2 * LAYERS]
    assert [site.path for site in explanation.sites][:2] == ["blocks.0.mhc.attn", "blocks.0.mhc.mlp"]


#: "eager" computes regions again as autograd meets them, "aot_eager" in a graph that a partitioner
#: cuts. (AOTAutograd drops what nobody reads, random numbers included, in the plain model as well.)
QUICK = {
    (dropout, "aot_eager"),
    (a_site_across_two_regions, "aot_eager"),
    (regions_in_a_region, "eager"),
    (hidden_states, "eager"),
    (in_place, "eager"),
}
RUNS = [
    pytest.param(how, inner_backend, marks=() if (how, inner_backend) in QUICK else pytest.mark.slow)
    for how, inner_backend in (
        *((how, "eager") for how in WAYS),
        *(
            (how, "aot_eager")
            for how in (every_block, regions_in_a_region, hidden_states, a_site_across_two_regions, dropout)
        ),
    )
]


@pytest.mark.parametrize(("how", "inner_backend"), RUNS, ids=lambda value: getattr(value, "__name__", value))
def test_outputs_and_gradients_are_those_of_the_model_without_checkpointing(how, inner_backend):
    model, off = pair(how)
    plain, ids = twin(off), tokens()
    options = {"inner_backend": inner_backend, "min_chain_length": 1}
    compiled = torch.compile(model, backend="mhc", options=options)
    uncheckpointed = torch.compile(off, backend="mhc", options=options)
    assert_same(step(compiled, model, ids), step(plain, plain, ids), 1e-9)
    step(uncheckpointed, off, ids)
    own, others = mhc_compile.connections(model), mhc_compile.connections(off)
    assert own.keys() == others.keys()
    assert own
    with torch.no_grad():
        for name, connection in own.items():
            for parameter, other in zip(connection.parameters(), others[name].parameters(), strict=True):
                other.copy_(parameter.normal_())
    got, want = step(compiled, model, ids), step(uncheckpointed, off, ids)
    assert got.gradients.keys() == want.gradients.keys() == dict(model.named_parameters()).keys()
    assert relative(want.logits, step(plain, plain, ids).logits) > 1e-3
    assert_same(got, want, 1e-9)


def test_reentrant_checkpoints():
    model, off = pair(every_block, reentrant=True)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})
    assert_same(step(compiled, model, tokens()), step(off, off, tokens()), 1e-9)
    assert len(mhc_compile.connections(model)) == 2 * LAYERS


def test_selective_checkpointing_keeps_its_policy():
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    model, off = pair(every_block, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    backward, compile_it = recorded(default_partition)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": compile_it})
    assert_same(step(compiled, model, tokens()), step(off, off, tokens()), 1e-9)
    assert torch.ops.mhc.coefficients.default in seen
    (graph,) = backward
    counts = Counter(node.target for node in graph.nodes)
    assert counts[torch.ops.aten.addmm.default] == 0
    assert counts[torch.ops.mhc.coefficients.default] == 2 * LAYERS


def test_a_shared_block_shares_its_parameters():
    def how(call, blocks, x):
        for _ in range(3):
            x = call(blocks[0], x)
        return x

    model, off = pair(how)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})
    assert_same(step(compiled, model, tokens()), step(off, off, tokens()), 1e-9)
    assert len(mhc_compile.connections(model)) == 2


def test_a_region_without_sites_is_the_region_of_the_model():
    def how(call, blocks, x):
        return call(lambda x: F.dropout(blocks[0].mlp(x), 0.5), x)

    model, off = pair(how)
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        got = step(torch.compile(model, backend="mhc", options={"inner_backend": "eager"}), model, tokens())
    assert_same(got, step(off, off, tokens()), 1e-9)
    graphs = []
    torch._dynamo.reset()
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        torch.compile(model, backend="mhc", options={"inner_backend": lambda g, i: graphs.append(g) or g})(tokens())
    (call,) = graphs[0].graph.find_nodes(op="call_function", target=CHECKPOINT)
    body = getattr(graphs[0], call.args[0].target)
    assert [n.target for n in body.graph.nodes if n.op == "call_function"][-1] is F.dropout


def test_a_second_length_is_compiled_with_dynamic_shapes():
    model, off = pair(every_block, layers=1)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})
    for length in (5, 7):
        ids = tokens(length=length)
        assert_same(step(compiled, model, ids), step(off, off, ids), 1e-9)


def test_the_gain_is_measured_through_regions():
    options = {"inner_backend": "eager"}
    gains = []
    for model in pair(every_block):
        mhc_compile.attach(model, tokens(), options=options)
        with torch.no_grad():
            for number, connection in enumerate(mhc_compile.connections(model).values()):
                connection.bias.copy_(torch.linspace(-2, 2, connection.bias.numel()).roll(number))
        sites = mhc_compile.stability(model, tokens(), options=options).sites
        gains.append([(site.composite_forward, site.composite_backward, site.entering) for site in sites])
    assert len(gains[0]) == 2 * LAYERS
    assert gains[0] == gains[1]


def test_regions_of_other_operations_are_named_in_the_report():
    class Nested(Block):
        @torch.compiler.nested_compile_region
        def forward(self, x):
            return super().forward(x)

    model = Checkpointed(every_block)
    model.blocks = nn.ModuleList(Nested(WIDTH) for _ in range(LAYERS))
    explanation = mhc_compile.explain(model, tokens())
    assert explanation.regions == {"invoke_subgraph": LAYERS}
    with pytest.warns(mhc_compile.MhcWarning, match=r"not analyzed \(invoke_subgraph\)"):
        got = step(torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"}), model, tokens())
    torch._dynamo.reset()
    assert_same(got, step(torch.compile(model, backend="aot_eager"), model, tokens()), 1e-6)


# --- what is kept for the backward
# --------------------------------------------------------------------------------------------------


def recorded(partition: Any) -> tuple[list[fx.Graph], Callable[..., Any]]:
    """A list that gets the backward graph, and the backend that puts it there."""
    graphs: list[fx.Graph] = []

    def backward(module: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module)

    forward = make_boxed_func
    return graphs, aot_autograd(
        fw_compiler=lambda module, inputs: forward(module), bw_compiler=backward, partition_fn=partition
    )


def kept(graph: fx.Graph) -> list[tuple[int, ...]]:
    """Shapes of what the forward keeps for the backward beside parameters and inputs of the
    model.
    """
    values = [
        n.meta.get("val")
        for n in graph.nodes
        if n.op == "placeholder" and "primals" not in n.name and "tangents" not in n.name
    ]
    return [tuple(v.shape) for v in values if isinstance(v, Tensor) and v.is_floating_point()]


@pytest.mark.parametrize(
    "partition", [pytest.param(default_partition, marks=pytest.mark.slow), min_cut_rematerialization_partition]
)
def test_only_the_streams_between_blocks_are_kept_and_the_rest_is_computed_again(partition):
    model, off = pair(every_block)
    batch, length, n = 2, 5, 4
    found = {}
    for m in (model, off):
        graphs, backend = recorded(partition)
        step(torch.compile(m, backend="mhc", options={"inner_backend": backend}), m, tokens(batch, length))
        (found[m],) = graphs
    shapes = Counter(kept(found[model]))
    # Between two blocks one set of streams, in front of the first the embedding, and behind the
    # last a few values of the head.
    assert shapes[batch, length, n, WIDTH] == LAYERS - 1
    outside = shapes - Counter({(batch, length, n, WIDTH): LAYERS - 1, (batch, length, WIDTH): 1})
    assert sum(outside.values()) <= 6
    assert not any(shape[-2:] == (n, n) for shape in shapes)  # no H_res
    counts = Counter(node.target for node in found[model].nodes)
    assert counts[torch.ops.mhc.coefficients.default] == 2 * LAYERS
    assert counts[torch.ops.mhc.collapse.default] == 2 * LAYERS
    # One update in every block, and the last of all: the final norm reads it, and the output of a
    # region is computed again as the rest of it is.
    assert counts[torch.ops.mhc.update.default] == LAYERS + 1
    assert counts[torch.ops.aten.addmm.default] >= 3 * LAYERS
    without = Counter(node.target for node in found[off].nodes)
    assert without[torch.ops.mhc.coefficients.default] == 0
    assert sum(map(math.prod, kept(found[off]))) > 4 * sum(map(math.prod, kept(found[model])))


# --- transformers
# --------------------------------------------------------------------------------------------------


def checkpointing(case: Case, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames the method in version 6
        case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
    case.model.train()


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("gpt2", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gpt2", True), ("llama", False)))],
)
def test_gradient_checkpointing_of_transformers(name, reentrant):
    case = build(name)
    case.model.train()
    plain = twin(case.model)
    want = run(case, plain, plain)
    usual = mhc_compile.explain(case.model, **case.inputs)
    checkpointing(case, use_reentrant=reentrant)
    explanation = mhc_compile.explain(case.model, **case.inputs)
    assert [site.path for site in explanation.sites] == [site.path for site in usual.sites]
    assert (len(explanation.chains), len(explanation.graphs)) == (1, 1)
    assert not explanation.regions
    torch._dynamo.reset()
    compiled = torch.compile(
        case.model, backend="mhc", options={"inner_backend": "eager" if reentrant else "aot_eager"}
    )
    assert_same(run(case, compiled, case.model), want, 1e-5)
    assert len(mhc_compile.connections(case.model)) == 2 * case.layers


def test_through_inductor():
    model = Checkpointed(every_block, layers=1)
    plain = twin(model)
    compiled = torch.compile(model, backend="mhc")
    assert_same(step(compiled, model, tokens()), step(plain, plain, tokens()), 1e-5)
    assert len(mhc_compile.connections(model)) == 2


@pytest.mark.slow
def test_a_model_of_transformers_through_inductor():
    case = build("gpt2")
    without_dropout(case.model).train()
    plain = twin(case.model)
    checkpointing(case, use_reentrant=False)
    compiled = torch.compile(case.model, backend="mhc")
    assert_same(run(case, compiled, case.model), run(case, plain, plain), 1e-5)
    assert len(mhc_compile.connections(case.model)) == 2 * case.layers
