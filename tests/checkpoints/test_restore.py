"""`mhc_compile.restore`: the hyper-connections of a checkpoint."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.builders import LAYERS, Decoder, tokens, twin
from helpers.gates import scatter
from safetensors.torch import save_file
from torch import nn

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}


def saved(layers: int = LAYERS, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the plain model, and the state of the same with hyper-connections that have left their
    start.
    """
    plain, model = _saved(layers, **options)
    return twin(plain), twin(model).state_dict()


@functools.cache
def _saved(layers: int, **options) -> tuple[nn.Module, nn.Module]:
    model = Decoder(layers=layers)
    plain = twin(model)
    mhc_compile.attach(model, tokens(), options=options)
    scatter(model, 1.0, add=True)
    return plain, model


def ours(state) -> set[str]:
    return {name for name in state if ".mhc." in name}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"streams": 2},
        {"streams": 3, "mapping": "identity"},
        *(pytest.param({"streams": n}, marks=pytest.mark.slow) for n in (1, 8)),
    ],
)
def test_state_dict(options):
    plain, state = saved(**options)
    found = mhc_compile.restore(plain, state)
    assert list(found) == [f"blocks.{i}.mhc.{branch}" for i in range(LAYERS) for branch in ("attn", "mlp")]
    assert {(c.streams, c.mapping) for c in found.values()} == {
        (options.get("streams", 4), options.get("mapping", "sinkhorn"))
    }
    assert [c.index for c in found.values()] == list(range(2 * LAYERS))
    assert plain.state_dict().keys() == state.keys()
    for name in ours(state):
        assert torch.equal(plain.state_dict()[name], state[name]), name
    plain.load_state_dict(state)


def test_a_state_dict_says_how_it_was_computed():
    """The settings of a compiled model, whose entries a script has renamed."""
    model = Decoder()
    plain = twin(model)
    mhc_compile.attach(model, tokens(), options={"preset": "deepseek-v4", "iterations": 3})
    state = torch.compile(model, backend="mhc").state_dict()
    for name in list(state):
        state[name.removeprefix("_orig_mod.")] = state.pop(name)
    found = mhc_compile.restore(plain, state)
    assert {(c.preset, c.iterations, c.end) for c in found.values()} == {("deepseek-v4", 3, "learned")}


def test_a_state_dict_of_a_version_without_speeds_keeps_speed_1():
    plain, state = saved(gate_speed=1.0, scale_speed=1.0)
    for entry in state._metadata.values():
        for name in ("gate_speed", "scale_speed"):
            entry.pop(name, None)
    for connection in mhc_compile.restore(twin(plain), state).values():
        assert connection.speeds == {"bias": 1.0, "scale": 1.0}
    for path, connection in mhc_compile.restore(plain, state, options={"gate_speed": 8.0}).items():
        assert connection.speeds == {"bias": 8.0, "scale": 1.0}
        assert torch.equal(8 * connection.bias, state[f"{path}.bias"])


def test_the_restored_model_computes_and_trains_what_the_saved_one_did():
    plain, state = saved()
    other = twin(plain)
    mhc_compile.attach(other, tokens())
    other.load_state_dict(state)
    want = torch.compile(other, backend="mhc", options=EAGER)(tokens())
    mhc_compile.restore(plain, state)
    assert not torch.allclose(mhc_compile.plain(plain)(tokens()), want)
    got = torch.compile(plain, backend="mhc", options=EAGER)(tokens())
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(c.phi.grad.any() for c in mhc_compile.connections(plain).values())


def test_no_second_trace_is_needed():
    """The names in the checkpoint give the modules that declare: the first compiled call finds
    everything in its place.
    """
    plain, state = saved()
    mhc_compile.restore(plain, state)
    hooks = {path: len(module._forward_pre_hooks) for path, module in plain.named_modules()}
    mhc_compile.attach(plain, tokens())
    assert hooks == {path: len(module._forward_pre_hooks) for path, module in plain.named_modules()}
    assert sum(hooks.values()) == 2 * LAYERS


def test_layers_are_in_order_although_their_names_are_not():
    plain, state = saved(layers=11)
    state = dict(sorted(state.items()))
    found = mhc_compile.restore(plain, state)
    assert [found[f"blocks.{i}.mhc.{branch}"].index for i in range(11) for branch in ("attn", "mlp")] == list(range(22))


def test_files(tmp_path):
    plain, state = saved()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "state.pt")
    torch.save({"state_dict": {f"net._orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "a.ckpt")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    parts = {"one.safetensors": sorted(state)[::2], "two.safetensors": sorted(state)[1::2]}
    for part, names in parts.items():
        save_file({name: state[name] for name in names}, sharded / part)
    index = {"weight_map": {name: part for part, names in parts.items() for name in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "state.pt", sharded):
        model = twin(plain)
        mhc_compile.restore(model, source)
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in ours(state))
    learner = nn.ModuleDict({"net": torch.compile(twin(plain), backend="mhc")})
    mhc_compile.restore(learner, tmp_path / "a.ckpt")
    assert ours(learner.state_dict()) == {f"net._orig_mod.{name}" for name in ours(state)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no checkpoint: none of model"):
        mhc_compile.restore(plain, tmp_path / "empty")


def restored(model, source, state) -> bool:
    """Return whether `restore` gives the model the hyper-connections of `state`."""
    mhc_compile.restore(model, source)
    return all(torch.equal(model.state_dict()[name], state[name]) for name in ours(state)) and bool(ours(state))


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_a_state_dict_is_found_at_any_depth(tmp_path):
    plain, state = saved()
    arguments = argparse.Namespace(model="vit", output=pathlib.Path("runs"))
    others = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}
    for content in (
        {"model": state, **others},
        {"model_state_dict": state, "args": arguments},
        {"state": {"network": state}, "config": {"n_layer": 2}},
        {"state_dict": prefixed("module.", state)},
        {"module": prefixed("_orig_mod.", state)},
        prefixed("module._orig_mod.", state),
        prefixed("learner.net.", state),
    ):
        torch.save(content, tmp_path / "checkpoint.pt")
        assert restored(twin(plain), tmp_path / "checkpoint.pt", state), list(content)
    assert restored(twin(plain), {"model": state, **others}, state)


def test_the_trained_model_is_taken_and_not_its_average(tmp_path):
    plain, state = saved()
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"state_dict_ema": average, "state_dict": state}, tmp_path / "both.pt")
    with pytest.warns(mhc_compile.MhcWarning, match="'state_dict', 'state_dict_ema'; those in 'state_dict' are taken"):
        assert restored(twin(plain), tmp_path / "both.pt", state)


class Config:
    """A class of the user's, which torch.load does not construct from a file."""


def test_objects_are_not_read_unsafely(tmp_path):
    plain, state = saved()
    torch.save({"model": state, "config": Config()}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        mhc_compile.errors.CheckpointError, match=r"plain values \(.*test_restore\.Config\), .*weights_only=False"
    ):
        mhc_compile.restore(plain, tmp_path / "checkpoint.pt")
    assert not mhc_compile.connections(plain)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert restored(plain, content, state)


def test_a_prefix_goes_only_where_it_leads_to_the_branches():
    plain, state = saved()
    mixed = {("other." if "attn" in name else "") + name: value for name, value in state.items()}
    for wrong in (mixed, prefixed("x.", {name.removeprefix("blocks."): value for name, value in state.items()})):
        with pytest.raises(mhc_compile.errors.AttachError, match="has no module"):
            mhc_compile.restore(plain, wrong)
        assert not mhc_compile.connections(plain)


@pytest.mark.parametrize("content", ["model", "app.model", "model and ema", ""])
def test_distributed_checkpoints(tmp_path, content):
    plain, state = saved()
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    contents = {
        "model": {"model": state, "optimizer": {"state": {"blocks.0.mhc.attn.phi": {"exp_avg": torch.ones(3)}}}},
        "app.model": {"app": {"model": state, "step": 3}},
        "model and ema": {"ema": average, "model": state},
        "": state,
    }
    dcp.save(contents[content], checkpoint_id=tmp_path, no_dist=True)
    context = pytest.warns(mhc_compile.MhcWarning, match="those in 'model' are") if "ema" in content else nullcontext()
    with context:
        assert restored(plain, tmp_path, state)


@pytest.mark.slow
def test_values_go_into_hyper_connections_that_exist_and_an_optimizer_gets_new_ones():
    plain, state = saved()
    there = twin(plain)
    before = mhc_compile.attach(there, tokens())
    assert mhc_compile.restore(there, state) == before
    assert all(torch.equal(there.state_dict()[name], state[name]) for name in ours(state))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    mhc_compile.restore(plain, state)
    torch.compile(plain, backend="mhc", options=EAGER)(tokens()).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(list(plain.parameters()))


def test_dtype_and_meta_device():
    plain, state = saved()
    half = {name: value.to(torch.bfloat16) for name, value in state.items()}
    assert {p.dtype for c in mhc_compile.restore(plain, half).values() for p in c.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model = Decoder()
    mhc_compile.restore(model, state)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.blocks[1].mhc.mlp.phi, state["blocks.1.mhc.mlp.phi"])


def test_errors_leave_the_model_as_it_was():
    plain, state = saved()
    lacking = {name: value for name, value in state.items() if name != "blocks.1.mhc.mlp.bias"}
    cases = [
        (plain.state_dict(), None, "the state dict has no hyper-connections"),
        (lacking, None, "blocks.1.mhc.mlp: the checkpoint lacks its bias"),
        ({"x.mhc.attn." + p: torch.zeros(3) for p in ("phi", "bias", "scale")}, None, "Decoder has no module 'x'"),
        (
            {**state, "blocks.0.mhc.attn.phi": torch.zeros(3)},
            None,
            r"phi is \[3\] .* does not fit any number of streams",
        ),
        (state, {"streams": 2}, r"phi is \[32, 24\] in the checkpoint, which does not fit streams=2"),
        (state, {"mapping": "identity"}, "does not fit mapping='identity'"),
        (state, mhc_compile.Options(streams=8), "does not fit streams=8, mapping='sinkhorn'"),
    ]
    for source, options, words in cases:
        with pytest.raises(mhc_compile.errors.AttachError, match=words):
            mhc_compile.restore(plain, source, options=options)
        assert not mhc_compile.connections(plain)
    mhc_compile.attach(plain, tokens(), options={"streams": 2})
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"on the model, which has 2 streams. Call mhc_compile.detach"
    ):
        mhc_compile.restore(plain, state)
    taken = Decoder()
    taken.blocks[0].mhc = nn.Linear(1, 1)
    with pytest.raises(mhc_compile.errors.AttachError, match="already has an attribute 'mhc'"):
        mhc_compile.restore(taken, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken(tokens())
