"""`mhc_compile.check` finds nothing in what is right, and names the tensor in what is wrong."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from helpers.builders import Decoder, Small, points, tokens
from torch import nn

import mhc_compile
from mhc_compile import check
from mhc_compile.errors import CaptureError, OptionError
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.ops import reference

EAGER = {"inner_backend": "eager"}


def groups(result):
    return {group.group: group for group in result.groups}


def test_every_tensor_is_the_same_and_every_site_is_live():
    result = check(Small(), points(), options=EAGER)
    assert result.ok, result.findings
    assert (result.planned, result.sites, result.live, result.graphs, result.recompiles) == (2, 2, 2, 1, 0)
    assert result.other_batch.size == 10
    found = groups(result)
    original = len(list(Small().parameters()))
    assert found["outputs"].count == 1
    assert found["gradients"].count == original
    assert found["live: gradients"].count == original + 3 * result.sites
    assert found["batch 10: gradients"].count == original
    assert 0 < found["live: gradients"].worst.relative < 1e-5
    names = {one.name for one in result.tensors if one.group == "gradients"}
    assert names == {name for name, _ in Small().named_parameters()}


def test_the_model_and_the_random_numbers_of_the_caller_stay_as_they_are():
    model = nn.Sequential(Small(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model(points()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    state, python = torch.get_rng_state(), random.getstate()
    result = check(model, points(), options=EAGER)
    assert result.ok, result.findings
    assert groups(result)["buffers"].count == 2
    assert groups(result)["input gradients"].count == 1
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    assert not mhc_compile.connections(model)


def test_streams_read_in_the_wrong_order_show_only_far_from_the_start(monkeypatch):
    """At the start the streams are equal, and any order does: the live proof is there for this."""
    right = reference.collapse
    monkeypatch.setattr(reference, "collapse", lambda streams, pre: right(streams, pre.flip(-1)))
    result = check(Small(), points(), options=EAGER)
    found = groups(result)
    assert found["outputs"].ok == found["outputs"].count
    assert found["live: outputs"].ok == 0
    assert found["live: outputs"].worst.name == "output"
    assert any(finding.startswith("live: outputs: 1 of 1 deviate, worst output") for finding in result.findings)


def test_a_perturbed_bias_is_no_preserving_start(monkeypatch):
    right = HyperConnection.reset_parameters

    def wrong(self):
        right(self)
        with torch.no_grad():
            self.bias[self.streams : 2 * self.streams] += 0.01

    monkeypatch.setattr(HyperConnection, "reset_parameters", wrong)
    result = check(Small(), points(), options=EAGER)
    assert not result.ok
    assert result.deviating[0].relative > 1e-4
    assert any(finding.startswith("outputs: 1 of 1 deviate, worst output") for finding in result.findings)


@pytest.mark.slow
def test_a_model_may_draw_from_numpy_and_python():
    class Drawing(Small):
        def forward(self, x):
            return super().forward(x) * float(np.random.rand(1)[0]) * (1 + random.random())

    result = check(Drawing(), points(), options=EAGER)
    assert result.ok, result.findings


class Drifting(nn.Module):
    """Another function under compilation: what a wrong rewrite would be."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.small = what, Small()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        y = self.small(x)
        if torch.compiler.is_compiling():
            if self.what == "gradient":
                y = y + 1e-3 * (self.small.pair.first.bias - self.small.pair.first.bias.detach()).sum()
            if self.what == "buffer":
                self.seen += 1
            if self.what == "input":
                y = y + 1e-3 * (x - x.detach())
        return y


@pytest.mark.parametrize(
    ("what", "group", "name"),
    [
        ("gradient", "gradients", "small.pair.first.bias"),
        pytest.param("buffer", "buffers", "seen", marks=pytest.mark.slow),
        pytest.param("input", "input gradients", "input.0.0", marks=pytest.mark.slow),
    ],
)
def test_the_tensor_that_deviates_is_named(what, group, name):
    result = check(Drifting(what), points(), options=EAGER)
    first = [one for one in result.deviating if not one.group.startswith(("batch", "live"))]
    assert [(one.group, one.name) for one in first] == [(group, name)]
    assert any(finding.startswith(f"{group}: 1 of") and name in finding for finding in result.findings)


def test_sites_that_take_no_part_are_not_live():
    def without_parameters(graph_module, inputs):
        """An inner compiler that loses phi, bias and scale."""
        calls = graph_module.graph.find_nodes(op="call_function", target=torch.ops.mhc.coefficients.default)
        lost = {parameter.name for node in calls for parameter in node.args[1:4]}
        names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
        return lambda *args: graph_module(
            *(torch.zeros_like(arg) if name in lost else arg for name, arg in zip(names, args, strict=True))
        )

    result = check(Small(), points(), options={"inner_backend": without_parameters})
    assert (result.sites, result.live) == (2, 0)
    assert any(finding.startswith("2 of 2 sites are not live") for finding in result.findings)


def test_a_model_that_is_compiled_again_and_again_is_a_finding():
    class Counting(Small):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1.0 if self.calls < 100 else 2.0)

    result = check(Counting(), points(), options=EAGER)
    assert result.recompiles > 0
    assert any("further calls with the same shapes compiled" in finding for finding in result.findings)


def test_nothing_rewritten_is_a_finding_with_the_warning():
    result = check(nn.Linear(3, 3), points(), options=EAGER)
    assert result.findings[0].startswith("nothing was rewritten")
    assert any("no addition of floating-point tensors" in warning for warning in result.warnings)


def test_rounding_in_half_precision_is_excused_by_the_plain_model_and_an_error_is_not(monkeypatch):
    result = check(Decoder(), tokens(), options=EAGER, dtype="bfloat16")
    assert result.ok, result.findings
    assert result.dtype == "bfloat16"
    assert result.wider == "float32"
    assert any(one.excused for one in result.tensors)
    right = reference.collapse
    monkeypatch.setattr(reference, "collapse", lambda streams, pre: right(streams, 1.2 * pre))
    assert "outputs" in {one.group for one in check(Small(), points(), options=EAGER, dtype=torch.bfloat16).deviating}


@pytest.mark.slow
def test_float64_is_held_to_its_own_tolerance():
    result = check(Small(), points(), options=EAGER, dtype="float64")
    assert result.ok, result.findings
    assert result.tolerance == 1e-10
    assert max(one.relative for one in result.tensors) < 1e-12


@pytest.mark.slow
def test_a_tolerance_that_nothing_meets_fails():
    """What the user asks for is not excused by rounding."""
    result = check(Small(), points(), options=EAGER, tolerance=1e-30)
    assert not result.ok
    assert not any(one.excused for one in result.tensors)


@pytest.mark.slow
def test_hyper_connections_that_a_model_has_keep_their_values_in_the_live_proof():
    model = Small()
    mhc_compile.attach(model, points())
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.phi.normal_(0, 0.3)
    result = check(model, points(), options=EAGER)
    assert result.ok, result.findings
    assert result.own
    assert (result.sites, result.live) == (2, 2)


@pytest.mark.slow
def test_a_written_input_is_compared_and_asked_for_no_gradient():
    class Writing(Small):
        def forward(self, x):
            return super().forward(x.mul_(2))

    result = check(Writing(), points(), options=EAGER)
    assert result.ok, result.findings
    assert groups(result)["written inputs"].count == 1
    assert "input gradients" not in groups(result)


def test_an_exported_program():
    program = torch.export.export(Small(), (points(),))
    result = check(program, options=EAGER)
    assert result.ok, result.findings
    assert (result.mode, result.sites, result.live) == ("exported", 2, 2)
    assert groups(result)["live: gradients"].count == len(program.state_dict) + 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("start", ["module", "program"])
def test_through_inductor_with_dropout(start):
    model = nn.Sequential(Small(), nn.Dropout(0.5))
    subject = torch.export.export(model, (points(),)) if start == "program" else model
    result = check(subject, points())
    assert result.ok, result.findings
    assert result.inner_backend == "inductor"


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: check(Small(), points(), dtype="int8"), OptionError, "dtype is 'int8'; expected one of float64"),
        (lambda: check(Small(), points(), tolerance=0), OptionError, "tolerance is 0; expected a positive number"),
        (lambda: check(Small(), points(), options={"stream": 2}), OptionError, "option 'stream' is unknown"),
        (
            lambda: check(Small(), tokens()),
            CaptureError,
            r"Small itself does not run with the example inputs \(input.0.0 \[2, 5\]\)",
        ),
        (lambda: check(Small(), points() * float("nan")), CaptureError, "Small itself gives NaN in output"),
        (
            lambda: check(torch.export.export(Small(), (points(),)), dtype="float64"),
            OptionError,
            "an exported program keeps its own",
        ),
    ],
)
def test_unsupported_input_raises_with_the_way_out(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
