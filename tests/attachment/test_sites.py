"""Attaching ahead of time, and taking everything off again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers.builders import LAYERS, Decoder, build, tokens, twin
from torch import nn

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}


def test_attach_creates_the_parameters_of_the_first_call():
    ahead, later = Decoder(), Decoder()
    later.load_state_dict(ahead.state_dict())
    attached = mhc_compile.attach(ahead, tokens())
    torch.compile(later, backend="mhc", options=EAGER)(tokens())
    assert list(attached) == [f"blocks.{i}.mhc.{branch}" for i in range(LAYERS) for branch in ("attn", "mlp")]
    assert ahead.state_dict().keys() == later.state_dict().keys()
    assert all(torch.equal(value, later.state_dict()[name]) for name, value in ahead.state_dict().items())


def test_attach_runs_nothing():
    ran = []
    model = Decoder()

    def contaminated(*args, **kwargs):
        ran.append(args)
        raise AssertionError("the model ran")

    # An operation of the model that executes would reach this kernel.
    library = torch.library.Library("mhc_test_attach", "DEF")
    library.define("probe(Tensor x) -> Tensor")
    library.impl("probe", contaminated, "CompositeExplicitAutograd")
    torch.library.register_fake("mhc_test_attach::probe", torch.empty_like, lib=library)
    model.embed = nn.Sequential(model.embed, _Probe())
    attached = mhc_compile.attach(model, tokens())
    assert len(attached) == 2 * LAYERS
    assert not ran
    with pytest.raises(AssertionError, match="the model ran"):
        model(tokens())


class _Probe(nn.Module):
    def forward(self, x):
        return torch.ops.mhc_test_attach.probe(x)


def test_attach_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = Decoder(width=8192, layers=4)
    attached = mhc_compile.attach(model, torch.zeros(1, 16, dtype=torch.long, device="meta"))
    assert {p.device.type for c in attached.values() for p in c.parameters()} == {"meta"}


def test_meta_construction_then_to_empty_then_reset():
    with torch.device("meta"):
        model = Decoder()
    mhc_compile.attach(model, tokens().to("meta"))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = mhc_compile.HyperConnection(8, index=1)
    assert torch.equal(model.blocks[0].mhc.mlp.bias, fresh.bias)
    assert not model.blocks[0].mhc.mlp.phi.any()


def test_attach_twice_is_attaching_once():
    model = Decoder()
    first = mhc_compile.attach(model, tokens())
    with torch.no_grad():
        first["blocks.0.mhc.attn"].phi.fill_(3.0)
    second = mhc_compile.attach(model, tokens())
    assert all(first[name] is second[name] for name in first)
    assert (second["blocks.0.mhc.attn"].phi == 3.0).all()
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 2 * LAYERS


def test_attach_takes_a_compiled_model_and_keyword_inputs():
    case = build("gpt2")
    compiled = torch.compile(case.model, backend="mhc", options=EAGER)
    assert len(mhc_compile.attach(compiled, **case.inputs)) == 2 * LAYERS
    assert len(mhc_compile.connections(compiled)) == 2 * LAYERS


def test_attach_does_not_touch_the_random_state():
    model = Decoder()
    state = torch.get_rng_state()
    mhc_compile.attach(model, tokens())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.zeros(2, 5),), r"Decoder could not be traced with the inputs \(float32\[2, 5\]\)"),
        ((), r"Decoder could not be traced with the inputs \(\): TypeError"),
        ((tokens(), tokens()), r"Decoder could not be traced with the inputs \(int64\[2, 5\], int64\[2, 5\]\)"),
    ],
)
def test_inputs_that_do_not_fit_the_model(args, words):
    model = Decoder()
    with pytest.raises(mhc_compile.errors.CaptureError, match=words):
        mhc_compile.attach(model, *args)
    assert not mhc_compile.connections(model)


def test_trouble_of_our_own_is_named(monkeypatch):
    from mhc_compile.compilation import session as study

    def broken(graph):
        raise RuntimeError("a pass fell over")

    monkeypatch.setattr(study, "normalize", broken)
    with pytest.raises(mhc_compile.errors.CaptureError, match="RuntimeError: a pass fell over"):
        mhc_compile.attach(Decoder(), tokens())


def test_attach_to_a_model_without_residual_adds():
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        assert mhc_compile.attach(nn.Linear(3, 3), torch.randn(2, 3)) == {}
    with pytest.raises(mhc_compile.errors.NothingRewrittenError):
        mhc_compile.attach(nn.Linear(3, 3), torch.randn(2, 3), options={"strict": True})
    with pytest.raises(mhc_compile.errors.OptionError, match="did you mean 'streams'"):
        mhc_compile.attach(nn.Linear(3, 3), torch.randn(2, 3), options={"stream": 2})


def test_deepcopy_and_pickle_carry_their_own_parameters():
    model = Decoder()
    mhc_compile.attach(model, tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        declared = other.blocks[0].attn._mhc_declared
        assert declared[0] is other.blocks[0].mhc.attn
        assert declared[0] is not model.blocks[0].mhc.attn
        out = torch.compile(other, backend="mhc", options=EAGER)(tokens())
        out.sum().backward()
        assert other.blocks[1].mhc.mlp.phi.grad is not None
        assert model.blocks[1].mhc.mlp.phi.grad is None


def test_to_moves_and_casts_the_parameters():
    model = Decoder()
    mhc_compile.attach(model, tokens())
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    out = torch.compile(model, backend="mhc", options=EAGER)(tokens())
    assert out.dtype == torch.float64


def test_detach_leaves_the_plain_model():
    model = Decoder()
    plain = twin(model)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens())
    assert mhc_compile.detach(compiled) == 2 * LAYERS
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens()), plain(tokens()))  # and no warning
    assert mhc_compile.detach(model) == 0


def test_nothing_keeps_a_model_alive():
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mhc_compile.explain(model, tokens())
    mhc_compile.attach(model, tokens())
    torch.compile(model, backend="mhc", options=EAGER)(tokens()).sum().backward()
    optimizer.step()
    gone = weakref.ref(model)
    del model, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_explain_and_attach_leave_compiled_versions_and_the_recompile_limit_alone():
    model = Decoder()
    calls = []

    def backend(graph_module, inputs):
        calls.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=backend)
    compiled(tokens())
    for _ in range(12):  # the limit is 8
        mhc_compile.explain(model, tokens())
    compiled(tokens())
    assert len(calls) == 1
    for _ in range(12):
        other = Decoder(layers=1)
        assert len(mhc_compile.attach(other, tokens())) == 2
