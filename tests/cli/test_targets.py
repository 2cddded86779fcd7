"""What the command line takes for a model, in this process; `test_cli.py` has the commands."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.builders import Small, points
from torch import nn

import mhc_compile
from mhc_compile.cli.error_handling import FactoryError, TargetError, WeightsError
from mhc_compile.cli.targets import load_target, parse_settings
from mhc_compile.cli.targets.weights import load_weights

MODELS = """
import os
import torch
from torch import nn

SIZE = 4

class Net(nn.Linear):
    pass

net = Net(4, 4)

def good():
    return Net(4, 4), (torch.randn(2, 4),), {}

def fails():
    return Net(4, 4)(torch.randn(2, 3))

def says_nothing():
    raise ValueError

def alone():
    return Net(4, 4)

def listed():
    return [Net(4, 4), torch.randn(2, 4)]

program = torch.export.export(Net(4, 4), (torch.randn(2, 4),))
"""

#: A decoder, an encoder and decoder, vision with windows, audio, experts, a state space, and a
#: nested config.
ARCHITECTURES = {
    "gpt2": {"input_ids"},
    "llama": {"input_ids"},
    "bert": {"input_ids"},
    "t5": {"input_ids", "decoder_input_ids"},
    "whisper": {"input_features", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "swin": {"pixel_values"},
    "resnet": {"pixel_values"},
    "clip": {"input_ids", "pixel_values"},
    "wav2vec2": {"input_values"},
    "mixtral": {"input_ids"},
    "deepseek_v3": {"input_ids"},
    "mamba2": {"input_ids"},
    "qwen2_vl": {"input_ids"},
    "gemma3": {"input_ids"},
    "autoformer": {"past_values", "past_time_features", "past_observed_mask"},
}
FAST = {"gpt2", "swin", "t5"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "targets_models.py").write_text(MODELS)
    (tmp_path / "targets_broken.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "targets_torn.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["targets_models.py:good", "targets_models:good", "targets_models.py:program"])
def test_a_factory_and_a_program_say_how_they_are_called(here, name):
    target = load_target(name, {})
    assert target.name == name
    call = target.model if isinstance(target.model, nn.Module) else target.model.module()
    assert call(*target.args, **target.kwargs).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("targets_models.py:god", "has no 'god'; near names: good"),
        ("targets_model.py:good", "there is no file 'targets_model.py'.*near names: targets_models.py"),
        ("nowhere/models.py:good", "there is no directory 'nowhere' either"),
        ("targets_model:good", "module 'targets_model' could not be imported.*near names: targets_models"),
        ("targets_models.py:net", r"is a model alone \(Net\), and nothing says how it is called"),
        ("targets_models.py:alone", "is a model alone"),
        ("targets_models.py:Net", "is a class; expected a function without arguments"),
        ("targets_models.py:SIZE", "is int; expected a function"),
        ("targets_models.py:listed", "returned list; expected"),
        ("targets_models.py", "is no target; expected package.module:factory"),
        ("absent.pt2", "there is no file 'absent.pt2'"),
        ("zoo:resnat", "no family 'resnat'; near names: resnet"),
    ],
)
def test_a_target_that_does_not_exist_lists_near_names(here, name, words):
    with pytest.raises(TargetError, match=words):
        load_target(name, {})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "targets_models.py:fails",
            r"targets_models.py:fails raised RuntimeError: mat1 .*\(targets_models.py:17, in .*linear.py:\d+\)",
        ),
        ("targets_models.py:says_nothing", r"raised ValueError \(targets_models.py:20\)"),
        ("targets_broken.py:x", r"targets_broken.py could not be run: it raised ValueError.*\(targets_broken.py:3\)"),
        (
            "targets_torn:x",
            r"could not be imported: it raised ModuleNotFoundError: No module named 'no_such_package_anywhere'",
        ),
    ],
)
def test_code_that_fails_is_named_with_its_line(here, name, words):
    with pytest.raises(FactoryError, match=words):
        load_target(name, {})


def test_a_saved_program_has_its_own_inputs(here):
    torch.export.save(torch.export.export(Small(), (points(),)), "small.pt2")
    target = load_target("small.pt2", {})
    assert [value.shape for value in target.args] == [points().shape]
    target.set_mode(False)
    (here / "torn.pt2").write_bytes((here / "small.pt2").read_bytes()[:200])
    with pytest.raises(TargetError, match=r"'torn.pt2' is no program that torch .* can load"):
        load_target("torn.pt2", {})
    program = torch.export.export(Small(), (points(),))
    program.example_inputs = None
    torch.export.save(program, "mute.pt2")
    with pytest.raises(TargetError, match="was saved without example inputs"):
        load_target("mute.pt2", {})


@pytest.mark.parametrize(
    "model_type", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_an_architecture_is_tiny_runs_and_is_the_same_every_time(model_type):
    one, other = load_target(f"hf:{model_type}", {}), load_target(f"hf:{model_type}", {})
    assert set(one.kwargs) == ARCHITECTURES[model_type]
    assert 0 < sum(parameter.numel() for parameter in one.model.parameters()) < 3_000_000
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    assert all(torch.equal(value, other.kwargs[name]) for name, value in one.kwargs.items())
    one.set_mode(False)
    with torch.no_grad():
        outputs = one.model(**one.kwargs)
    assert all(value.isfinite().all() for value in outputs.values() if isinstance(value, torch.Tensor))


def test_settings_hold_whatever_is_scaled_and_in_nested_configs():
    model = load_target("hf:gpt2", {"hidden_size": 48, "n_layer": 3}).model
    assert (model.config.n_embd, model.config.n_layer, len(model.transformer.h)) == (48, 3, 3)
    settings = parse_settings(("text_config.num_hidden_layers=4", "text_config.vocab_size=300"))
    config = load_target("hf:gemma3", settings).model.config.text_config
    assert (config.num_hidden_layers, len(config.layer_types), config.vocab_size) == (4, 4, 300)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("hf:llamo", {}, "knows no model type 'llamo'; near names: llama"),
        ("hf:gpt2", {"n_lauer": 2}, "--set n_lauer: the config of gpt2 has no such field; near names: n_layer"),
        ("hf:gemma3", {"hidden_size": 2}, "no such field; near names: text_config.hidden_size"),
        ("hf:gemma3", {"test_config.hidden_size": 2}, "has no such nested config; near names: text_config"),
        ("hf:gpt2", {"hidden_size": -3}, "no tiny model of type 'gpt2' could be made.*Write a factory"),
        ("zoo:resnet", {"width": 2}, "one setting, layers=N"),
        ("some.py:thing", {"layers": 2}, "--set is for hf: and zoo: targets"),
    ],
)
def test_wrong_setting_is_reported_with_near_names(name, settings, words):
    with pytest.raises(TargetError, match=words):
        load_target(name, settings)


def test_full_size_takes_no_memory():
    model = load_target("hf:gpt2", {}, full_size=True).model
    assert (model.config.n_layer, model.config.n_embd) == (12, 768)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def target_of(model):
    from mhc_compile.cli.targets import Target

    return Target("models.py:small", model, (points(),), {})


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "nested", "compiled"])
def test_weights_are_those_of_the_file(tmp_path, kind):
    torch.manual_seed(1)
    saved, model = Small(), Small()
    state, path = saved.state_dict(), os.fspath(tmp_path / "weights.pt")
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = os.fspath(tmp_path / "weights.safetensors")
        save_file(state, path)
    elif kind == "nested":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"_orig_mod.{name}" if kind == "compiled" else name: value for name, value in state.items()}, path)
    load_weights(target_of(model), path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_with_hyper_connections_bring_them_along(tmp_path):
    saved, model = Small(), Small()
    mhc_compile.attach(saved, points(), options={"streams": 2})
    with torch.no_grad():
        saved.pair.mhc.first.phi.normal_()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    load_weights(target_of(model), os.fspath(tmp_path / "weights.pt"))
    assert set(mhc_compile.connections(model)) == set(Small.SITES)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


def test_of_tied_weights_one_name_will_do(tmp_path):
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    torch.save({"embed.weight": torch.ones(5, 4)}, tmp_path / "weights.pt")
    model = tied()
    load_weights(target_of(model), os.fspath(tmp_path / "weights.pt"))
    assert model["head"].weight.eq(1).all()


class Script:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"inwards.weight": torch.zeros(2, 2)},
            r"of the model are not in the file .*, and 1 with other shapes: inwards.weight is \[2, 2\] in",
        ),
        (
            {**Small().state_dict(), "more.bias": torch.zeros(1)},
            r"1 entries of the file are not in the model \(more.bias\)",
        ),
        ({"a": 1}, "found a dict with 'a'; expected a state dict"),
        ([torch.zeros(1)], "found a list; expected a state dict"),
        (Script(), r"Python objects that are no tensors \(\w+.system\), which could run code"),
    ],
)
def test_weights_that_do_not_fit_are_reported_and_the_script_does_not_run(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pt")
    with pytest.raises(WeightsError, match=words):
        load_weights(target_of(Small()), "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_there_or_for_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_text("no zip")
    with pytest.raises(TargetError, match=r"no file 'weight.pt'.*near names: weights.pt"):
        load_weights(target_of(Small()), "weight.pt")
    with pytest.raises(WeightsError, match="no checkpoint that torch"):
        load_weights(target_of(Small()), "weights.pt")
    with pytest.raises(WeightsError, match="an exported program, which has its weights in it"):
        load_weights(target_of(torch.export.export(Small(), (points(),))), "weights.pt")
