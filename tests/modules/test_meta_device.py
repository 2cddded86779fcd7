"""Parameters that leave the meta device have their start or the values that were loaded, whatever
way they leave it. Memory that nobody wrote is full of sevens here.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.builders import Small, points, tokens
from torch import nn

import mhc_compile
from mhc_compile import HyperConnection, Options
from mhc_compile.errors import ShapeError
from mhc_compile.modules.gated import create_connection

WIDTH = 10
EAGER = {"inner_backend": "eager"}
KINDS = {
    "default": Options(),
    "static": Options(token_dependent=False),
    "two streams, random": Options(streams=2, init="random"),
    "learned read-out": Options(preset="deepseek-v4"),
    "gated": Options(preset="qwen4-exp", init="random"),
}


@pytest.fixture(autouse=True)
def _dirty_memory(monkeypatch):
    empty_like = torch.empty_like

    def sevens(*args, **settings):
        value = empty_like(*args, **settings)
        return value if value.is_meta else value.fill_(7.0)

    monkeypatch.setattr(torch, "empty_like", sevens)


def build(kind, **settings):
    torch.manual_seed(5)
    return create_connection(WIDTH, Options.parse(KINDS[kind]), index=1, last=True, **settings)


def assert_equal(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_to_empty(kind, inside):
    want = build(kind)
    connection = build(kind, device="meta")
    torch.manual_seed(5)
    with torch.device("meta" if inside else "cpu"):  # where a program materializes and what it draws there
        connection.to_empty(device="cpu")
    assert_equal(connection, want)


def test_to_a_device_and_a_copy():
    connection = build("default", device="meta")
    assert_equal(copy.deepcopy(connection).to("cpu"), build("default"))
    assert_equal(connection.double().to_empty(device="cpu"), build("default", dtype=torch.float64))


def test_without_values_there_is_no_result():
    with pytest.raises(ShapeError, match=r"streams on cpu need phi, bias and scale there; got meta"):
        build("default", device="meta")(torch.randn(3, 4, WIDTH), torch.tanh)


def test_values_that_were_loaded_stay():
    connection, phi = build("default", device="meta"), torch.full((4 * WIDTH, 24), 3.0)
    connection.phi = nn.Parameter(phi)
    connection.to_empty(device="cpu")
    assert (connection.phi == 7.0).all()  # as for any module: it was not on the meta device
    assert torch.equal(connection.bias, build("default").bias)
    state = {name: torch.full_like(value, 2.0) for name, value in build("default").state_dict().items()}
    connection = build("default", device="meta")
    connection.load_state_dict(state, assign=True)
    connection._is_hf_initialized = True
    assert all((value == 2.0).all() for value in connection.state_dict().values())


def test_what_transformers_puts_in():
    """Values that it loaded are marked; for others it puts in memory and has the model's own init,
    which knows no hyper-connections, write them. Then it marks the module.
    """
    connection = build("default", device="meta")
    loaded = nn.Parameter(torch.full((24,), 2.0))
    loaded._is_hf_initialized = True
    connection.bias = loaded
    connection.phi, connection.scale = (
        nn.Parameter(torch.empty_like(p, device="cpu")) for p in (connection.phi, connection.scale)
    )
    connection._is_hf_initialized = True
    want = build("default")
    assert (connection.bias == 2.0).all()
    assert torch.equal(connection.phi, want.phi)
    assert torch.equal(connection.scale, want.scale)
    with torch.no_grad():
        connection.phi.fill_(1.0)
    connection._is_hf_initialized = True
    assert (connection.phi == 1.0).all()


def test_a_checkpoint_of_the_plain_model_leaves_hyper_connections_on_meta():
    """They get their start, and their place in the optimizer, at the first compiled call."""
    plain = Small()
    with torch.device("meta"):
        model = Small()
    mhc_compile.attach(model, points().to("meta"))
    model.load_state_dict(plain.state_dict(), strict=False, assign=True)
    assert model.pair.mhc.first.phi.is_meta
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = torch.compile(model, backend="mhc", options=EAGER)(points())
    assert torch.allclose(out, plain(points()), atol=1e-6)
    out.square().sum().backward()
    optimizer.step()
    assert all(c.phi.any() and not (c.phi == 7.0).any() for c in mhc_compile.connections(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("init", ["preserve", "random"])
def test_from_pretrained(tmp_path, init):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {"init": init}

    class Planned(GPT2LMHeadModel):
        """A model whose constructor attaches."""

        def __init__(self, config):
            super().__init__(config)
            ids = torch.zeros(1, 4, dtype=torch.long, device=self.transformer.wte.weight.device)
            mhc_compile.attach(self, input_ids=ids, use_cache=False, options=options)

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0)
    plain, full = GPT2LMHeadModel(config).eval(), Planned(config).eval()
    with torch.no_grad():
        for connection in mhc_compile.connections(full).values():
            for parameter in connection.parameters():
                parameter.add_(torch.randn_like(parameter))
    plain.save_pretrained(tmp_path / "plain")
    full.save_pretrained(tmp_path / "full")

    def dispatched(name):
        with init_empty_weights():
            model = Planned(config)
        model.tie_weights()
        return load_checkpoint_and_dispatch(model, str(tmp_path / name / "model.safetensors"), device_map={"": "cpu"})

    for load in (lambda name: Planned.from_pretrained(tmp_path / name), dispatched):
        from_plain, from_full = load("plain").eval(), load("full").eval()
        for name, value in full.state_dict().items():
            assert torch.equal(from_full.state_dict()[name], value), name
        for path, connection in mhc_compile.connections(from_plain).items():
            fresh = HyperConnection(16, Options(init=init), index=connection.index)
            for name in ("phi", "bias", "scale"):
                value, want = getattr(connection, name), getattr(fresh, name)
                if name == "phi" and init == "random":
                    assert value.std().item() == pytest.approx(want.std().item(), rel=0.1), path
                else:
                    assert torch.equal(value, want), (path, name)
        ids = tokens()
        call = torch.compile(from_plain, backend="mhc", options=EAGER | options)
        if init == "preserve":
            assert torch.allclose(call(input_ids=ids, use_cache=False).logits, plain(input_ids=ids).logits, atol=1e-6)
