"""Streams across graph boundaries: a model in pieces computes what it computes in one graph, at
random parameters.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Attention, Block, tokens
from helpers.gates import scatter
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc_compile
import mhc_compile.errors
from mhc_compile.graph_breaks import runtime as boundary
from mhc_compile.graph_breaks import stream_registry as carried

EAGER = {"inner_backend": "eager"}
LAYERS = 3


class PostNorm(nn.Module):
    """A block of BERT: norms stand behind the adds, and the last of them at its end."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(nn.Module):
    """A block of GPT-J: one add of three terms."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attn(h) + self.mlp(h)


class Convolutions(nn.Module):
    """A block of a ResNet: channels first, one add, and a ReLU at the end."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.second(F.relu(self.first(x))))


class Feed(nn.Module):
    """A block with one add, and little to compile."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class InBlock(Block):
    """A graph break between the two adds of a block."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        torch._dynamo.graph_break()
        return x + self.mlp(self.norm2(x))


class BrokenAttention(Attention):
    """A graph break in the middle of a branch."""

    def forward(self, x):
        qkv = self.qkv(x)
        torch._dynamo.graph_break()
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Opaque(nn.Sequential):
    """A branch that Dynamo does not see, as routing in Python may be."""

    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class Stack(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, block=Block, width=8, layers=LAYERS):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 1) if block is Convolutions else nn.Embedding(11, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = self.between(block(x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)

    def between(self, x):
        return x


class Broken(Stack):
    """A graph break behind every block."""

    def between(self, x):
        torch._dynamo.graph_break()
        return x


def inputs(block=Block):
    return torch.randn(2, 3, 4, 5) if block is Convolutions else tokens()


def randomise(model):
    scatter(model, 0.5, generator=torch.Generator().manual_seed(1))
    return model


@functools.cache
def _attached(block, **options):
    torch.manual_seed(0)
    model, x = Stack(block), inputs(block)
    mhc_compile.attach(model, x, options={"min_chain_length": 1, **options})
    return randomise(model), x


def attached(block=Block, **options):
    """Return a model with random hyper-connections, other ones in every block, and its inputs."""
    model, x = _attached(block, **options)
    return copy.deepcopy(model), x


def per_block(model, **options):
    for block in model.blocks:
        block.compile(backend="mhc", options={**EAGER, **options})
    return model


def run(model, called, x):
    """The loss, the output and the gradient of every parameter."""
    model.zero_grad()
    output = called(x)
    output.square().mean().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert got[1][name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            got[1][name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def whole(model, x, **options):
    """The reference: the same model in one graph."""
    twin = copy.deepcopy(model)
    return run(twin, torch.compile(twin, backend="mhc", fullgraph=True, options={**EAGER, **options}), x)


@functools.cache
def _whole(block):
    return whole(*attached(block))


def prepared(block=Block):
    """Return what `attached` returns, and the reference for it."""
    return *attached(block), _whole(block)


@pytest.fixture(autouse=True)
def _lost_streams_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", mhc_compile.MhcWarning)
        yield


@pytest.mark.parametrize("block", [Block, PostNorm, Parallel, Convolutions, InBlock])
def test_blocks_compiled_one_by_one(block):
    model, x, expected = prepared(Block if block is InBlock else block)
    if block is InBlock:
        for member in model.blocks:
            member.__class__ = InBlock
    assert_same(run(model, per_block(model), x), expected)


@pytest.mark.parametrize("block", [Block, PostNorm, Parallel, Convolutions])
def test_a_graph_break_between_blocks(block):
    model, x, expected = prepared(block)
    model.__class__ = Broken
    assert_same(run(model, torch.compile(model, backend="mhc", options=EAGER), x), expected)


def test_a_graph_break_inside_a_block():
    model, x, expected = prepared()
    for block in model.blocks:
        block.__class__ = InBlock
    assert_same(run(model, torch.compile(model, backend="mhc", options=EAGER), x), expected)


def cut(model, *, attention=True, mlp=True):
    """The same model with graph breaks inside its branches."""
    for block in model.blocks:
        if attention:
            block.attn.__class__ = BrokenAttention
        if mlp:
            block.mlp.__class__ = Opaque
    return model


@pytest.mark.parametrize(
    ("block", "where"),
    [
        *(pytest.param(Block, where, marks=pytest.mark.slow) for where in ("attention", "mlp")),
        (Block, "both"),
        (PostNorm, "attention"),
    ],
)
def test_a_graph_break_inside_a_branch(block, where):
    """The branch begins in one graph and ends in another. `attach` sees both."""
    model, x, expected = prepared(block)
    parameters = copy.deepcopy(model.state_dict())
    mhc_compile.detach(model)
    cut(model, attention=where != "mlp", mlp=where != "attention")
    mhc_compile.attach(model, x, options={"min_chain_length": 1})
    model.load_state_dict(parameters)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    assert_same(run(model, compiled, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0])


def test_a_graph_break_inside_a_branch_without_attach():
    """The first call finds the two halves, by the history of what it computes; from the second on
    they work together.
    """
    model, x, expected = prepared()
    parameters = copy.deepcopy(model.state_dict())
    mhc_compile.detach(model)
    plain = cut(copy.deepcopy(model))(x)
    compiled = torch.compile(cut(model), backend="mhc", options=EAGER)
    torch.testing.assert_close(compiled(x), plain)
    assert model.state_dict().keys() == parameters.keys()
    model.load_state_dict(parameters)
    assert_same(run(model, compiled, x), expected)


@pytest.mark.parametrize("where", [*(pytest.param(w, marks=pytest.mark.slow) for w in (0, 1, 3)), 2, 4])
def test_sites_have_the_same_names_and_numbers_wherever_the_break_is(where):
    """before the norm, before the first layer, between the two, behind the second, behind the
    add
    """

    class Stopping(nn.Module):
        broken = True

        def __init__(self, width):
            super().__init__()
            self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

        def forward(self, x):
            self.stop(0)
            h = self.norm(x)
            self.stop(1)
            h = self.wide(h).relu()
            self.stop(2)
            h = self.narrow(h)
            self.stop(3)
            x = x + h
            self.stop(4)
            return x

        def stop(self, here):
            if self.broken and here == where:
                torch._dynamo.graph_break()

    torch.manual_seed(0)
    model, plain = Stack(Stopping), Stack(Stopping)
    plain.load_state_dict(model.state_dict())
    for block in plain.blocks:
        block.broken = False
    mhc_compile.attach(model, tokens())
    mhc_compile.attach(plain, tokens())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    randomise(model)
    randomise(plain)
    got = run(model, torch.compile(model, backend="mhc", options=EAGER), tokens())
    assert_same(got, run(plain, torch.compile(plain, backend="mhc", options=EAGER), tokens()))


def test_a_branch_without_weights_is_no_branch_in_two_halves_either():
    class Normed(Block):
        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            h = self.norm2(x)
            torch._dynamo.graph_break()
            return x + h

    torch.manual_seed(0)
    model = Stack(Normed)
    mhc_compile.attach(model, tokens(), options={"min_chain_length": 1})
    assert set(mhc_compile.connections(model)) == {f"blocks.{number}.mhc.attn" for number in range(LAYERS)}
    (reason,) = mhc_compile.explain(model, tokens()).reasons
    assert reason == "independent"


def test_branch_begun_by_python_is_rejected_with_a_warning():
    """Nothing can give Python another value to read than the tensor that it has in its
    hands.
    """
    model, x = attached(PostNorm)
    mhc_compile.detach(model)
    compiled = torch.compile(cut(model, attention=False), backend="mhc", options=EAGER)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", mhc_compile.MhcWarning)
        compiled(x)
    told = r"a residual add of a function \(.*test_runtime.py:\d+\) .* ran outside of this graph"
    assert re.match(told, str(said[0].message))
    assert set(mhc_compile.connections(model)) == {f"blocks.{number}.mhc.attn" for number in range(LAYERS)}
    torch._dynamo.reset()
    strict = torch.compile(copy.deepcopy(model), backend="mhc", options={**EAGER, "strict": True})
    with pytest.raises(mhc_compile.errors.StreamsLostError, match="outside of this graph"):
        strict(x)


def test_without_the_crossing_the_streams_are_lost(monkeypatch):
    model, x, expected = prepared()
    monkeypatch.setattr(boundary, "register_streams", lambda *_, **__: None)
    output, _ = run(model, per_block(model), x)
    assert (output - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("block", "inner_backend"),
    [(Block, "aot_eager"), (Feed, "inductor"), pytest.param(Block, "inductor", marks=pytest.mark.slow)],
)
def test_blocks_through_the_compiler(block, inner_backend):
    model, x, expected = prepared(block)
    assert_same(run(model, per_block(model, inner_backend=inner_backend), x), expected)


def test_modules_that_torch_compile_wrapped():
    model, x, expected = prepared()
    parameters = {name.replace("blocks.", ""): value for name, value in expected[1].items()}
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="mhc", options=EAGER)
    output, gradients = run(model, model, x)
    torch.testing.assert_close(output, expected[0])
    plain = {name.replace("blocks.", "").replace("_orig_mod.", ""): value for name, value in gradients.items()}
    assert_same((output, plain), (expected[0], parameters))


def test_one_graph_serves_all_blocks(monkeypatch):
    """With hyper-connections from `attach`, and where the first call attaches them: no block is
    compiled again.
    """
    graphs = []

    def inner_backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    options = {"inner_backend": inner_backend}
    model, x, expected = prepared()
    for block in model.blocks:
        block.compile(backend="mhc", options=options)
    assert_same(run(model, model, x), expected)
    assert len(graphs) == 1

    graphs.clear()
    torch._dynamo.reset()
    fresh = Stack(layers=12)
    ahead = Stack(layers=12)
    for block in fresh.blocks:
        block.compile(backend="mhc", options=options)
    run(fresh, fresh, x)
    assert len(graphs) == 1
    mhc_compile.attach(ahead, x)
    indices = {name: connection.index for name, connection in mhc_compile.connections(ahead).items()}
    assert {name: connection.index for name, connection in mhc_compile.connections(fresh).items()} == indices


@pytest.mark.parametrize("wrapped", ["outside", "inside"])
def test_activation_checkpointing_round_compiled_blocks(wrapped):
    model, x, expected = prepared()
    compiled = per_block(model)

    def forward(x):
        x = compiled.embed(x)
        for block in compiled.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return compiled.head(x)

    called = forward if wrapped == "outside" else torch.compile(forward, backend="mhc", options=EAGER)
    assert_same(run(model, called, x), expected)


def test_reentrant_checkpoint_falls_back_with_a_warning():
    """Its first forward does not record and its second has other tensors: streams cannot go
    through. Both must see the same values.
    """
    model, x = attached()
    per_block(model)

    def forward(x):
        x = model.embed(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return model.head(x)

    with pytest.warns(mhc_compile.MhcWarning, match="as in a reentrant checkpoint"):
        got = run(model, forward, x)

    def apart(x):
        x = model.embed(x)
        for block in model.blocks:
            x = block(x * 1.0)
        return model.head(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mhc_compile.MhcWarning)
        assert_same(got, run(model, apart, x))


CHANGES = {
    "made again": lambda x: x.clone(),
    "written to in place": lambda x: x.mul_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_starts_as_copies_and_is_reported(change):
    class Changed(Stack):
        def between(self, x):
            return CHANGES[change](x)

    model, x = attached()
    model.__class__ = Changed
    per_block(model)
    with pytest.warns(
        mhc_compile.MhcWarning,
        match=rf"streams behind Block\.mhc\.mlp end before Block\.mhc\.attn .*builders\.py:.*{change}",
    ):
        output, _ = run(model, model, x)

    # The reference: every block by itself, on copies.
    value = model.embed(x)
    for block in model.blocks:
        value = torch.compile(copy.deepcopy(block), backend="mhc", options=EAGER)(value.detach().clone())
    torch.testing.assert_close(output, model.head(value))

    strict, _ = attached()
    strict.__class__ = Changed
    with pytest.raises(mhc_compile.errors.StreamsLostError, match=change):
        per_block(strict, strict=True)(x)


def test_a_value_that_is_only_read_is_no_loss():
    model, x, expected = prepared()
    kept = []

    class Reading(Stack):
        def between(self, x):
            kept.append(x.detach().norm())
            return x

    model.__class__ = Reading
    assert_same(run(model, per_block(model), x), expected)
    assert len(kept) == LAYERS


def test_wrappers_that_pass_tensors_through_keep_the_streams():
    """Module hooks on the backward give a block other tensors than the caller has: the same memory,
    behind an operation that changes nothing.
    """

    class Wrapper(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x)

    model, x, expected = prepared()
    per_block(model)
    seen = []
    wrappers = [Wrapper(block) for block in model.blocks]
    for wrapper in wrappers:
        wrapper.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0].abs().sum()))

    def forward(x):
        x = model.embed(x)
        for wrapper in wrappers:
            x = wrapper(x)
        return model.head(x)

    assert_same(run(model, forward, x), expected)
    assert len(seen) == LAYERS
    assert all(seen)


def test_gradient_of_a_hidden_state_arrives_at_the_trunk():
    """At the default start it is the gradient in the plain model."""
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Stack()
        if compiled:
            per_block(model)
        hidden = model.blocks[0](model.embed(tokens()))
        hidden.register_hook(gradients.append)
        model.head(model.blocks[2](model.blocks[1](hidden))).square().mean().backward()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model, x, (expected, _) = prepared()
    with mode():
        torch.testing.assert_close(per_block(model)(x), expected)


def test_a_graph_has_one_input_and_one_result_more_where_streams_cross_and_none_elsewhere():
    def sizes(compile_it):
        torch._dynamo.reset()
        model, x = attached()
        seen = []

        def inner_backend(graph_module, example_inputs):
            graph = graph_module.graph
            arriving = [node for node in graph.find_nodes(op="placeholder") if "mhc_arriving" in str(node.target)]
            seen.append((len(arriving), len(graph.output_node().args[0])))
            assert len(example_inputs) == len(graph.find_nodes(op="placeholder"))
            return graph_module

        compile_it(model, inner_backend)(x)
        return seen

    def blocks(model, inner_backend):
        return per_block(model, inner_backend=inner_backend)

    def everything(model, inner_backend):
        return torch.compile(model, backend="mhc", options={"inner_backend": inner_backend})

    assert sizes(blocks) == [(1, 2)]
    assert sizes(everything) == [(0, 1)]


def test_growing_shapes():
    """Two graphs serve all blocks and all lengths: one for the first, one for any other."""
    model, _ = attached()
    graphs = []

    def inner_backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    per_block(model, inner_backend=inner_backend)
    for length in (4, 5, 7):
        x = tokens(length=length)
        twin = copy.deepcopy(model)
        for block in twin.blocks:
            block._compiled_call_impl = None
        assert_same(run(model, model, x), whole(twin, x))
    assert len(graphs) == 2


def test_autocast_keeps_the_streams():
    model, x = attached()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.compile(twin, backend="mhc", fullgraph=True, options=EAGER)(x)
        got = per_block(model)(x)
    torch.testing.assert_close(got, expected)


def test_streams_die_with_their_tensor():
    model, x = attached()
    per_block(model)
    value = model.blocks[0](model.embed(x))
    found = carried.find_registered(value)
    assert found is not None
    streams = weakref.ref(found[1].streams)
    del found, value
    gc.collect()
    assert streams() is None
    assert not len(carried._carried)


def test_another_number_of_streams_is_another_model():
    first, x = attached(streams=2)
    second, _ = attached(streams=4)
    per_block(first, streams=2)
    per_block(second, streams=4)
    with pytest.warns(mhc_compile.MhcWarning, match="there they are 2, here 4"):
        second.blocks[0](first.blocks[0](first.embed(x)))
