"""Options: one validated value, and errors that name the way out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.builders import Decoder, tokens

from mhc_compile import MhcError, Options
from mhc_compile.config.presets import PRESETS
from mhc_compile.errors import OptionError


def test_defaults_are_the_paper():
    options = Options.parse(None)
    assert (options.streams, options.mapping, options.iterations, options.init_gain) == (4, "sinkhorn", 20, 0.01)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.streams = 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"steams": 4},
            r"option 'steams' is unknown; did you mean 'streams'\? known options: preset, streams, mapping",
        ),
        ({"max_autotune": True}, r"option 'max_autotune' is unknown; .*Settings for Inductor go under 'inductor'"),
        ({"streams": 0}, "option 'streams' is 0; expected an integer from 1 to 8"),
        ({"streams": 9}, "option 'streams' is 9; expected an integer from 1 to 8"),
        ({"streams": "4"}, r"option 'streams' is '4' \(str\); expected an integer from 1 to 8"),
        ({"streams": True}, r"option 'streams' is True \(bool\); expected an integer"),
        ({"streams": 4.0}, r"option 'streams' is 4.0 \(float\); expected an integer"),
        ({"iterations": 0}, "option 'iterations' is 0; expected an integer from 1 to 1000"),
        ({"mapping": "sinkhorm"}, "option 'mapping' is 'sinkhorm'; did you mean 'sinkhorn'"),
        ({"mapping": 3}, r"option 'mapping' is 3 \(int\); expected one of 'sinkhorn', 'identity'"),
        ({"init": "zero"}, "option 'init' is 'zero'; .*expected one of 'preserve', 'random'"),
        ({"init_gain": 0}, "option 'init_gain' is 0; .*would never learn"),
        ({"init_gain": float("nan")}, "option 'init_gain' is nan"),
        ({"init_stream_weight": 1.0}, "option 'init_stream_weight' is 1.0; expected a number from 0.001 to 0.999"),
        ({"gate_speed": 0}, "option 'gate_speed' is 0; expected a number from 0.001 to 1000"),
        ({"scale_speed": 0}, "option 'scale_speed' is 0; expected a number from 0.001 to 1000"),
        ({"gate_speed": "8"}, r"option 'gate_speed' is '8' \(str\); expected a number"),
        (
            {"preset": "qwen4-exp", "init": "random", "gate_speed": 8.0},
            "gate_speed=8.0 and scale_speed=1.0 are factors in logits c a z \\+ s b, and with rank=320 there are none",
        ),
        ({"min_chain_length": 0}, "option 'min_chain_length' is 0; expected a positive integer"),
        ({"strict": 1}, r"option 'strict' is 1 \(int\); expected True or False"),
        ({"inner_backend": "indutor"}, "option 'inner_backend' is 'indutor'; did you mean 'inductor'"),
        ({"existing_optimizers": "extnd"}, "option 'existing_optimizers' is 'extnd'; did you mean 'extend'"),
        ({"inductor": 3}, r"option 'inductor' is 3 \(int\); expected a dict"),
    ],
)
def test_a_wrong_option_is_an_error_that_restates_it(given, words):
    with pytest.raises(OptionError, match=words):
        Options.parse(given)


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({}, "sinkhorn;gate_speed=32.0;scale_speed=0.0078125"),
        ({"mapping": "identity"}, "identity;gate_speed=32.0;scale_speed=0.0078125"),
        ({"mapping": "unconstrained"}, "unconstrained;scale_speed=0.0078125"),
        ({"mapping": "unconstrained", "gate_speed": 8}, "unconstrained;gate_speed=8.0;scale_speed=0.0078125"),
        ({"init": "random"}, "sinkhorn"),
        ({"gate_speed": 1, "scale_speed": 1}, "sinkhorn"),
        ({"preset": "liger"}, "sinkhorn;sinkhorn_eps=1e-06;last=columns"),
        ({"preset": "glm5-next", "gate_speed": 2}, "sinkhorn;pre_eps=1e-06;sinkhorn_eps=1e-06;gate_speed=2.0"),
    ],
)
def test_the_speed_of_gates_is_that_of_the_start_and_part_of_the_convention(given, spec):
    assert Options.parse(given).spec == spec


def test_a_site_with_another_mapping_has_the_speed_of_that():
    options = Options.parse({"overrides": {"mlp": {"mapping": "unconstrained"}, "attn": {"gate_speed": 3.0}}})
    assert [options.at(path).speeds[0] for path in ("a.mlp", "a.attn", "a.other")] == [1.0, 3.0, 32.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_replacing_the_preset_keeps_what_was_given_and_nothing_else(preset):
    given = {"init": "random"}  # one preset has no function-preserving init
    assert dataclasses.replace(Options(**given), preset=preset) == Options(**given, preset=preset)
    explicit = dataclasses.replace(Options(**given, read_out="mean", eps=1e-6), preset=preset)
    assert (explicit.resolved.read_out, explicit.resolved.eps) == ("mean", 1e-6)
    assert dataclasses.replace(Options(**given), preset=preset).resolved.eps == PRESETS[preset].eps


def test_wrong_options_leave_torch_compile_as_themselves():
    model = Decoder()
    compiled = torch.compile(model, backend="mhc", options={"steams": 4})
    with pytest.raises(OptionError, match="did you mean 'streams'") as caught:
        compiled(tokens())
    assert isinstance(caught.value, MhcError)
    assert not any("mhc" in name for name, _ in model.named_parameters())


def test_options_that_are_no_dict():
    with pytest.raises(OptionError, match="options are 4"):
        Options.parse(4)
