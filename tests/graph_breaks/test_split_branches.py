"""A branch whose middle Dynamo does not trace, in a model that has hyper-connections already.

The right values are those of mHC written by hand, in float64, at parameters far from the start.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.builders import Attention, Block, Decoder, relative, tokens
from torch import nn

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
N = 4
gradients = pytest.mark.parametrize("gradients", [pytest.param(True, marks=pytest.mark.slow), False])


class UntracedAttention(Attention):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class Frozen(nn.Module):
    """An attention whose weights are no parameters, as integers; perhaps nothing is recorded."""

    recorded = False

    def __init__(self, inner):
        super().__init__()
        self._inner = [inner]

    @torch.compiler.disable
    def forward(self, x):
        with torch.set_grad_enabled(self.recorded and torch.is_grad_enabled()):
            return self._inner[0](x)


@torch.compiler.disable
def add_outside(x, y):
    return x + y


class Untraced(nn.Sequential):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class AddsOutside(Block):
    """A graph break in the first branch; its sum may run outside of any graph."""

    outside = False

    def forward(self, x):
        h = self.attn(self.norm1(x))
        torch._dynamo.graph_break()
        x = add_outside(x, h) if self.outside else x + h
        return x + self.mlp(self.norm2(x))


def stirred(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            for name, parameter in connection.named_parameters():
                size = 0.7 / connection.speeds.get(name, 1)
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def attached(seed=0):
    torch.manual_seed(seed)
    model = Decoder()
    mhc_compile.attach(model, tokens(), options=EAGER)
    return stirred(model, seed + 1)


def untraced(model, kind=UntracedAttention):
    """Swap the attentions for ones that Dynamo does not trace, as flash or quantised ones."""
    for block in model.blocks:
        if kind is Frozen:
            block.attn = Frozen(block.attn)
        else:
            new = kind(block.attn.qkv.in_features)
            new.load_state_dict(block.attn.state_dict())
            block.attn = new
    return model


def by_hand(model, x):
    """The model as mHC (arXiv 2512.24880, equations 5 to 9), written out."""
    sites = {path: site.double() for path, site in mhc_compile.connections(copy.deepcopy(model)).items()}
    plain = Decoder().double()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".mhc." not in name}, strict=False
    )
    for block, own in zip(plain.blocks, model.blocks, strict=True):
        if isinstance(own.attn, Frozen):
            block.attn.load_state_dict(own.attn._inner[0].state_dict())
    value = plain.embed(x)
    streams = value.unsqueeze(-2).expand(*value.shape[:-1], N, value.shape[-1])
    for number, block in enumerate(plain.blocks):
        branches = {"attn": lambda h, b=block: b.attn(b.norm1(h)), "mlp": lambda h, b=block: b.mlp(b.norm2(h))}
        for name, branch in branches.items():
            site = sites[f"blocks.{number}.mhc.{name}"]
            flat = streams.flatten(-2)
            flat = flat * (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            scale = torch.cat([site.scale[i].expand(k) for i, k in enumerate((N, N, N * N))])
            logits = (flat @ site.phi) * scale / 128 + 32 * site.bias  # the default speeds
            pre, post = logits[..., :N].sigmoid(), 2 * logits[..., N : 2 * N].sigmoid()
            res = logits[..., 2 * N :].softmax(-1).unflatten(-1, (N, N))
            for _ in range(20):
                res = res / res.sum(-2, keepdim=True)
                res = res / res.sum(-1, keepdim=True)
            out = branch((pre.unsqueeze(-1) * streams).sum(-2))
            streams = res @ streams + post.unsqueeze(-1) * out.unsqueeze(-2)
    return plain.head(plain.norm(streams.mean(-2))).detach()


def call(compiled, x):
    """The output and the warnings of one call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compiled(x).detach()
    return output, [str(entry.message) for entry in caught if isinstance(entry.message, mhc_compile.MhcWarning)]


def assert_right_after_one_warning(model, compiled, branch="attn", misses=1):
    x = tokens()
    want = by_hand(model, x)
    (first, told), (second, more), (third, yet_more) = (call(compiled, x) for _ in range(3))
    assert relative(first, want) > 1e-2
    # A block that is missed before the beginnings are traced again is reported as well.
    assert len(set(told)) == 1
    assert len(told) <= misses
    assert f"the branch {branch!r} of Block ran outside of the graph of its residual add" in told[0]
    assert "that add is a plain one, without its hyper-connection, and others are not. Both are traced" in told[0]
    assert more == yet_more == []
    assert relative(second, want) < 1e-5
    assert relative(third, want) < 1e-5


@gradients
def test_restored_model(gradients):
    source = attached()
    model = untraced(Decoder())
    model.load_state_dict({name: value for name, value in source.state_dict().items() if ".mhc." not in name})
    mhc_compile.restore(model, {name: value for name, value in source.state_dict().items() if ".mhc." in name})
    with torch.set_grad_enabled(gradients):
        assert_right_after_one_warning(model, torch.compile(model, backend="mhc", options=EAGER))
    # In the calls that are right, a call of the attention outside of a graph is no plain run.
    assert [site.plain for site in mhc_compile.audit(model).sites] == [1, 0, 0, 0]


@gradients
def test_the_second_branch(gradients):
    """Without gradients the order of the sites tells which branch it is."""
    model = attached()
    for block in model.blocks:
        block.mlp.__class__ = Untraced
    with torch.set_grad_enabled(gradients):
        assert_right_after_one_warning(model, torch.compile(model, backend="mhc", options=EAGER), "mlp")


@pytest.mark.parametrize(
    "mode",
    [nullcontext, *(pytest.param(mode, marks=pytest.mark.slow) for mode in (torch.no_grad, torch.inference_mode))],
)
def test_swapped_after_training(mode):
    torch.manual_seed(0)
    model = Decoder()
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens()).square().mean().backward()
    stirred(untraced(model))
    with mode():
        assert_right_after_one_warning(model, compiled)


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_that_are_no_parameters(recorded):
    model = untraced(attached(), Frozen)
    for block in model.blocks:
        block.attn.recorded = recorded
        mhc_compile.detach(block.attn._inner[0])  # the hook that declares parameters
    assert_right_after_one_warning(model, torch.compile(model, backend="mhc", options=EAGER))


@pytest.mark.slow
def test_gradients_after_the_first_call_are_those_by_hand():
    model = untraced(attached())
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    call(compiled, tokens())
    compiled(tokens()).square().mean().backward()
    twin = untraced(attached(), Attention)
    torch.compile(twin, backend="mhc", fullgraph=True, options=EAGER)(tokens()).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@gradients
def test_two_models_that_share_graphs(gradients):
    with torch.set_grad_enabled(gradients):
        for seed in (0, 1):
            model = untraced(attached(seed))
            assert_right_after_one_warning(model, torch.compile(model, backend="mhc", options=EAGER), misses=1 + seed)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plain_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_plain_model_with_the_same_code(backend, plain_first):
    """The code after the branch is `x + output` for both: no module tells them apart."""
    model = attached()
    for block in model.blocks:
        block.mlp.__class__ = Untraced
    mhc_compile.attach(model, tokens(), options=EAGER)
    plain = mhc_compile.plain(model)
    want = {model: by_hand(model, tokens()), plain: plain(tokens()).detach()}
    order = (plain, model) if plain_first else (model, plain)
    compiled = {one: torch.compile(one, backend=backend) for one in order}
    for _ in range(3):
        for one, run in compiled.items():
            output, told = call(run, tokens())
            assert told == []
            assert relative(output, want[one]) < 1e-5


@pytest.mark.slow
def test_blocks_that_a_function_runs():
    """Nothing shows that they are equivalent: each begins when it is missed."""
    model = untraced(attached())
    first, second = model.blocks

    def forward(x):
        return model.head(model.norm(second(first(model.embed(x)))))

    assert_right_after_one_warning(model, torch.compile(forward, backend="mhc", options=EAGER), misses=2)


def test_strict_raises_in_the_first_call():
    model = untraced(attached())
    compiled = torch.compile(model, backend="mhc", options={**EAGER, "strict": True})
    with pytest.raises(mhc_compile.errors.StreamsLostError, match=r"mhc_compile\.attach\(model"):
        compiled(tokens())
    assert relative(compiled(tokens()).detach(), by_hand(model, tokens())) < 1e-5


@pytest.mark.slow
def test_attach_before_the_first_call_is_the_way_out():
    model = untraced(attached())
    mhc_compile.attach(model, tokens(), options=EAGER)
    output, told = call(torch.compile(model, backend="mhc", options={**EAGER, "strict": True}), tokens())
    assert told == []
    assert relative(output, by_hand(model, tokens())) < 1e-5


def test_a_break_behind_the_layers_of_a_branch_is_right_in_the_first_call():
    """The parameters are declared in the graph that has no sum: the site is known."""
    model = attached()
    for block in model.blocks:
        block.__class__ = AddsOutside
    output, told = call(torch.compile(model, backend="mhc", options=EAGER), tokens())
    assert told == []
    assert relative(output, by_hand(model, tokens())) < 1e-5


@gradients
def test_an_add_outside_of_any_graph_is_reported(gradients):
    model = attached()
    for block in model.blocks:
        block.__class__ = AddsOutside
        block.outside = True
    with torch.set_grad_enabled(gradients):
        _, told = call(torch.compile(model, backend="mhc", options=EAGER), tokens())
        assert len(told) == 1
        assert "the branch 'attn' of AddsOutside began on streams, and its residual add ran outside" in told[0]
        torch._dynamo.reset()
        strict = torch.compile(model, backend="mhc", options={**EAGER, "strict": True})
        with pytest.raises(mhc_compile.errors.StreamsLostError, match="began on streams"):
            strict(tokens())


def test_a_last_add_outside_is_reported_when_it_repeats():
    """No later graph misses its streams."""

    class Last(nn.Module):
        outside = False

        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.attn(self.norm(x))
            torch._dynamo.graph_break()
            return add_outside(x, h) if self.outside else x + h

    torch.manual_seed(0)
    model, x = Last(), torch.randn(2, 5, 8)
    mhc_compile.attach(model, x, options={**EAGER, "min_chain_length": 1})
    model.outside = True
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    told = [message for _ in range(4) for message in call(compiled, torch.randn(2, 5, 8))[1]]
    assert len(told) == 1
    assert "the branch 'attn' of Last" in told[0]
    assert "began on streams 3 times, and no compiled graph had its residual add" in told[0]


def test_one_branch_that_is_added_twice_is_reported():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.attn(self.norm(x))
            torch._dynamo.graph_break()
            y = x + h
            torch._dynamo.graph_break()
            return y, x + add_outside(h, h)

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 5, 8)
    mhc_compile.attach(model, x, options={**EAGER, "min_chain_length": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model, backend="mhc", options=EAGER)(x)
    assert any("is added to its streams twice" in str(entry.message) for entry in caught)
    torch._dynamo.reset()
    strict = torch.compile(model, backend="mhc", options={**EAGER, "strict": True})
    with pytest.raises(mhc_compile.errors.StreamsLostError, match="twice"):
        strict(x)


def test_streams_lost_without_gradients_are_reported():
    model = attached()
    for block in model.blocks:
        block.compile(backend="mhc", options=EAGER)

    def forward(x, change=lambda value: value):
        value = model.embed(x)
        for block in model.blocks:
            value = change(block(value))
        return model.head(model.norm(value))

    with torch.no_grad():
        output, told = call(forward, tokens())
        assert told == []
        assert relative(output, by_hand(model, tokens())) < 1e-5
        _, told = call(lambda x: forward(x, torch.clone), tokens())
        assert len(told) == 1
        assert "Block.mhc.mlp end before Block.mhc.attn" in told[0]
        value = torch.randn(2, 5, 8)
        for block in reversed(model.blocks):  # blocks by themselves start from copies, and lose nothing
            assert call(block, value)[1] == []
