"""Checkpoints that are not of the very model: the plain one's, a compiled one's, one with other
options, a damaged one.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.builders import Decoder, tokens, twin
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
LACKING = "no values for the hyper-connection 'blocks.0.mhc.attn': it looks like one of the plain model"


def attached(layers=2, width=8, **options):
    """The same every time for the same arguments."""
    return copy.deepcopy(_attached(layers, width, **options))


@functools.cache
def _attached(layers, width, **options):
    model = Decoder(width, layers)
    mhc_compile.attach(model, tokens(), options=options)
    return model


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(one, other):
    a, b = (
        {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()} for model in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load_with_torch(model, state, **kwargs):
    return model.load_state_dict(state, **kwargs)


BOTH = pytest.mark.parametrize("load", [load_with_torch, mhc_compile.load_state_dict], ids=["torch", "ours"])


def test_names_with_and_without_the_prefix_of_ddp():
    source = trained(attached())
    state = source.state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    plain, inside = attached(), torch.nn.ModuleDict({"module": attached()})
    mhc_compile.load_state_dict(plain, wrapped)
    mhc_compile.load_state_dict(inside, state)
    assert same(plain, source)
    assert same(inside["module"], source)


# The plain model's


@BOTH
def test_a_plain_checkpoint_into_a_model_with_hyper_connections(load):
    plain, model = trained(Decoder()), attached()
    with pytest.warns(mhc_compile.MhcWarning, match=LACKING) as told:
        result = load(model, plain.state_dict())
    assert len(told) == 1  # not one for each site
    assert told[0].filename == __file__
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.allclose(torch.compile(model, backend="mhc", options=EAGER)(tokens()), plain(tokens()), atol=1e-5)


@BOTH
def test_learned_hyper_connections_survive_loading_a_plain_checkpoint(load):
    plain, model = Decoder(), trained(attached())
    before = {name: value.clone() for name, value in model.state_dict().items() if ".mhc." in name}
    with pytest.warns(mhc_compile.MhcWarning, match="keep the values they have"):
        load(model, plain.state_dict())
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert all(torch.equal(now[name], value) for name, value in plain.state_dict().items())


def test_a_plain_safetensors_file_of_a_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, model = Decoder(), attached()
    safetensors.save_model(plain, tmp_path / "plain.safetensors")
    with pytest.warns(mhc_compile.MhcWarning, match=LACKING):
        assert safetensors.load_model(model, tmp_path / "plain.safetensors") == (set(), [])
    assert torch.equal(model.head.weight, plain.head.weight)


def test_a_plain_distributed_checkpoint(tmp_path):
    plain, model = Decoder(), attached()
    dcp.save(plain.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state, fresh = model.state_dict(), twin(model).state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True, planner=DefaultLoadPlanner(allow_partial_load=True))
    model.load_state_dict(state)
    assert all(
        torch.equal(value, plain.state_dict().get(name, fresh[name])) for name, value in model.state_dict().items()
    )
    assert torch.equal(model.head.weight, plain.head.weight)


def test_a_distributed_load_that_leaves_hyper_connections_out_says_so(tmp_path):
    model, plain = trained(attached()), Decoder()
    dcp.save({"app": {"model": model.state_dict(), "step": 3}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.warns(mhc_compile.MhcWarning, match=r"has hyper-connections \(app\.model\.blocks\.0\.mhc\..*restore"):
        dcp.load({"app": {"model": plain.state_dict()}}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"app": {"step": 0}}, checkpoint_id=tmp_path, no_dist=True)  # no model is loaded
    mhc_compile.restore(plain, tmp_path)
    dcp.load({"app": {"model": plain.state_dict()}}, checkpoint_id=tmp_path, no_dist=True)
    assert same(plain, model)


def test_a_block_of_the_plain_model():
    plain, model = Decoder(), attached()
    with pytest.warns(mhc_compile.MhcWarning, match="hyper-connection 'mhc.attn'"):
        model.blocks[1].load_state_dict(plain.blocks[1].state_dict())
    assert torch.equal(model.blocks[1].attn.out.weight, plain.blocks[1].attn.out.weight)


@BOTH
@pytest.mark.parametrize("gone", ["blocks.0.mhc.attn", "blocks.0.mhc.mlp", "blocks.1.mhc.mlp"])
def test_a_checkpoint_that_lacks_some_hyper_connections_is_an_error(gone, load):
    """Whichever it is: the first, one in the middle, the last."""
    model = attached()
    state = {name: value for name, value in attached().state_dict().items() if not name.startswith(gone)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, mhc_compile.errors.AttachError)) as caught:
            load(model, state)
    assert gone in str(caught.value)
    others = [name for name in mhc_compile.connections(model) if name != gone]
    assert not any(name in str(caught.value) for name in others)


@BOTH
def test_a_checkpoint_that_lacks_one_tensor_is_an_error(load):
    state = attached().state_dict()
    del state["blocks.1.mhc.attn.scale"]
    with pytest.raises((RuntimeError, mhc_compile.errors.AttachError), match=r"blocks\.1\.mhc\.attn"):
        load(attached(), state)


def test_partly_missing_keys_are_reported_without_strict():
    model, state = attached(), attached().state_dict()
    partial = {name: value for name, value in state.items() if not name.startswith("blocks.1.mhc")}
    missing = set(state) - set(partial)
    for load in (load_with_torch, mhc_compile.load_state_dict):
        assert set(load(model, partial, strict=False).missing_keys) == missing


def test_torch_shows_every_module_of_a_call_the_same_list_of_missing_keys():
    """The record of a call is found by it; a torch that does otherwise must fail here."""
    seen = []

    class Listed(torch.nn.Linear):
        def _load_from_state_dict(self, *args):
            seen.append(args[4])
            super()._load_from_state_dict(*args)

    model = torch.nn.ModuleList(Listed(2, 2) for _ in range(3))
    for _ in range(2):
        model.load_state_dict(model.state_dict())
    assert [one is seen[0] for one in seen] == [True] * 3 + [False] * 3
    assert seen[3] is seen[4] is seen[5]


def test_a_load_inside_a_load_does_not_disturb_it():
    """What was found before the inner call counts after it: a checkpoint that lacks the last site
    is an error.
    """
    model, other = attached(), attached()
    state = {name: value for name, value in attached().state_dict().items() if not name.startswith("blocks.1.mhc")}

    class Loading(torch.nn.Module):
        def _load_from_state_dict(self, *args):
            other.load_state_dict(attached().state_dict())

    model.blocks.insert(1, Loading())
    state = {name.replace("blocks.1", "blocks.2"): value for name, value in state.items()}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks\.2\.mhc\.attn\.phi"'):
        model.load_state_dict(state)


def test_other_missing_and_unexpected_entries_stay_torch_s_business():
    plain, model = Decoder(), attached()
    state = plain.state_dict()
    state["blocks.7.stranger"] = state.pop("head.bias")
    for load in (load_with_torch, mhc_compile.load_state_dict):
        with (
            pytest.warns(mhc_compile.MhcWarning, match=LACKING),
            pytest.raises(
                RuntimeError, match=r'Missing key[^:]*: "head\.bias"\.\s+Unexpected key[^:]*: "blocks\.7\.stranger"\.'
            ),
        ):
            load(model, state)


def test_on_the_meta_device_there_is_nothing_to_keep():
    plain = Decoder()
    with torch.device("meta"):
        model = Decoder()
    mhc_compile.attach(model, tokens().to("meta"))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks\.0\.mhc\.attn\.phi"'):
        model.load_state_dict(plain.state_dict(), assign=True)


# Into the plain model


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, r"mhc_compile\.attach\(model, \*example_inputs\)"),
        ({"streams": 2}, r"example_inputs, options=\{'streams': 2\}\)"),
        ({"streams": 3, "mapping": "identity"}, r"options=\{'streams': 3, 'mapping': 'identity'\}\)"),
    ],
)
def test_into_a_plain_model(options, hint):
    state, plain = attached(**options).state_dict(), Decoder()
    words = (
        r"the checkpoint has 4 hyper-connections \(blocks\.0\.mhc\.attn, blocks\.0\.mhc\.mlp, blocks\.1\.mhc\.attn, \.\.\.\) and"
        rf" Decoder has none\. Attach them before loading: .*{hint}"
    )
    for target in (plain, torch.compile(plain, backend="mhc")):
        with pytest.raises(mhc_compile.errors.AttachError, match=words):
            mhc_compile.load_state_dict(target, state)
    mhc_compile.attach(plain, tokens(), options=options)
    mhc_compile.load_state_dict(plain, state)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_module_named_mhc_of_the_model_is_no_hyper_connection():
    plain = Decoder()
    plain.mhc = torch.nn.Sequential(torch.nn.Linear(2, 2))
    other = copy.deepcopy(plain)
    mhc_compile.load_state_dict(other, trained(plain).state_dict())
    assert same(plain, other)


# Names of compiled models


@pytest.mark.parametrize("source", ["plain", "compiled", "compiled blocks"])
@pytest.mark.parametrize("target", ["plain", "compiled", "compiled blocks"])
def test_names_of_compiled_models(source, target):
    def dress(model, how):
        if how == "compiled blocks":
            for i, block in enumerate(model.blocks):
                model.blocks[i] = torch.compile(block, backend="mhc", options=EAGER)
        return torch.compile(model, backend="mhc", options=EAGER) if how == "compiled" else model

    have, want = dress(attached(), target), dress(trained(attached()), source)
    state = want.state_dict()
    assert any("_orig_mod" in name for name in state) == (source != "plain")
    names = list(state)
    result = mhc_compile.load_state_dict(have, state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(have, want)
    assert list(state) == names


# Checkpoints that do not fit


@BOTH
@pytest.mark.parametrize(
    ("saved", "has", "words"),
    [
        ({"streams": 2}, {}, r"made with streams=2: attach and compile with options=\{'streams': 2\}"),
        ({"mapping": "identity"}, {}, r"made with mapping='identity': attach and compile with options"),
        (
            {"mapping": "identity", "streams": 8},
            {"streams": 2},
            r"made with streams=8, mapping='identity': attach and compile",
        ),
        ({"width": 12}, {}, r"is of a model of width 12 \(streams=4, mapping='sinkhorn'\), this one has width 8"),
    ],
)
def test_other_options(saved, has, words, load):
    model, state = attached(**has), attached(**saved).state_dict()
    ours, theirs = (f"{list(shapes['blocks.0.mhc.attn.phi'].shape)}" for shapes in (model.state_dict(), state))
    with pytest.raises(RuntimeError) as caught:
        load(model, state)
    text = str(caught.value)
    assert f"blocks.0.mhc.attn.phi {theirs} instead of {ours}" in text
    assert "blocks.1.mhc.mlp.phi" in text
    assert "size mismatch for blocks.0.mhc" not in text  # torch's own sentence would say it twice
    assert len(re.findall(words, text)) == 1


@BOTH
def test_a_tensor_of_an_impossible_shape(load):
    model, state = attached(), attached().state_dict()
    state["blocks.0.mhc.mlp.bias"] = torch.zeros(23)
    with pytest.raises(
        RuntimeError,
        match=r"blocks\.0\.mhc\.mlp\.bias \[23\] instead of \[24\].*checkpoint is damaged, or of something else",
    ):
        load(model, state)
    state["blocks.0.mhc.mlp.bias"] = "text"
    with pytest.raises(RuntimeError, match=r'"blocks\.0\.mhc\.mlp\.bias", expected torch\.Tensor'):
        load(model, state)


@BOTH
@pytest.mark.parametrize(("layers", "words"), [(1, "Decoder has 2 .*lacks"), (3, "checkpoint has 2 .*Decoder lacks")])
def test_another_number_of_layers(layers, words, load):
    """The words are ours; torch names every entry, of the hyper-connections and of the rest."""
    with pytest.raises((RuntimeError, mhc_compile.errors.AttachError)) as caught:
        load(attached(), attached(layers).state_dict())
    assert f"blocks.{min(layers, 2)}.mhc.attn" in str(caught.value)
    if load is mhc_compile.load_state_dict:
        assert re.search(words, str(caught.value))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value, load):
    model, state = attached(), copy.deepcopy(attached().state_dict())
    state["blocks.1.mhc.attn.bias"][3] = value
    with pytest.warns(mhc_compile.MhcWarning, match=r"^blocks\.1\.mhc\.attn\.bias has values .* not finite") as told:
        load(model, state)
    assert len(told) == 1
    assert not torch.isfinite(model.blocks[1].mhc.attn.bias).all()


@BOTH
def test_the_same_shapes_and_another_function(load, tmp_path):
    """The number of iterations is in no shape. torch.save keeps it as metadata of the state
    dict.
    """
    torch.save(attached(iterations=5).state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    with pytest.warns(
        mhc_compile.MhcWarning, match=r"saved with iterations=5 and is loaded into one with iterations=20"
    ) as told:
        load(attached(), state)
    assert len(told) == 1
    load(attached(iterations=5), state)


def compute(model):
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    return compiled(tokens()).detach()


@BOTH
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("saved", "now"),
    [((1, 1), (32, 1 / 128)), ((8, 8), (32, 1 / 128)), ((32, 1 / 128), (1, 1)), ((3, 0.1), (32, 1 / 128))],
)
def test_gates_of_other_speeds_are_converted(saved, now, assign, load, tmp_path):
    names = "gate_speed", "scale_speed"
    source = trained(attached(**dict(zip(names, saved, strict=True))))
    state = source.state_dict()
    for entry in state._metadata.values():  # of versions without speeds, and with one for both
        for name, speed in zip(names, saved, strict=True):
            if speed == 1 or (name == "scale_speed" and speed == saved[0]):
                entry.pop(name, None)
    torch.save(state, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")
    before = {name: value.clone() for name, value in state.items()}
    target = attached(**dict(zip(names, now, strict=True)))
    load(target, state, assign=assign)
    assert all(torch.equal(value, state[name]) for name, value in before.items())
    for path, connection in mhc_compile.connections(target).items():
        for name, had, has in zip(("bias", "scale"), saved, now, strict=True):
            assert torch.allclose(has * connection.get_parameter(name), had * before[f"{path}.{name}"], rtol=1e-6)
    # Power-of-two ratios change no bit of a result.
    error = (compute(target) - compute(source)).abs().max()
    exact = saved[0] != 3
    assert error == 0 if exact else error < 1e-5, error
    again = attached(**dict(zip(names, saved, strict=True)))
    load(again, target.state_dict())
    assert not exact or same(again, source)


def test_metadata_is_found_under_the_names_of_compiled_models():
    state = torch.compile(attached(iterations=5), backend="mhc").state_dict()
    with pytest.warns(mhc_compile.MhcWarning, match="saved with iterations=5"):
        mhc_compile.load_state_dict(attached(), state)
