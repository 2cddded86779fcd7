"""The models of libraries, unmodified: found, rewritten, preserved."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import FAMILIES, LAYERS, assert_same, build, distance, relative, run, twin, without_dropout
from torch import nn

import mhc_compile

EAGER = {"inner_backend": "eager"}


def families(*quick: str):
    """Parametrize over all families; the default run has `quick` alone."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FAMILIES]
    )


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("gpt2", {"broadcast": 1, "no-contraction": LAYERS}),  # positions; tanh-GELU
        ("llama", {"independent": 2 * LAYERS}),  # rotary q and k
        ("qwen2", {"independent": 2 * LAYERS}),
        ("mistral", {"independent": 2 * LAYERS}),
        ("opt", {"independent": 1}),
        ("vit", {"broadcast": 1}),  # position table [1, T, C] on [B, T, C]
        ("encoder", {}),
    ],
)
def test_every_residual_add_is_a_site_of_one_chain_and_no_other_add_is_touched(name, reasons):
    case = build(name)
    explanation = mhc_compile.explain(case.model, **case.inputs)
    assert len(explanation.sites) == 2 * LAYERS
    assert len(explanation.chains) == 1
    assert len(explanation.graphs) == 1
    owners = [site.owner for site in explanation.sites]
    assert owners == [owner for owner in dict.fromkeys(owners) for _ in range(2)]
    assert len(set(owners)) == LAYERS
    assert dict(explanation.reasons) == reasons


@pytest.mark.parametrize("inner_backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@families("gpt2", "mistral", "vit")
def test_default_start_preserves_outputs_and_gradients(name, inner_backend):
    case = build(name)
    case.model.train()
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options={"inner_backend": inner_backend})
    want = run(case, plain, plain)
    got = run(case, compiled, case.model)
    assert len(mhc_compile.connections(case.model)) == 2 * LAYERS
    assert_same(got, want, 1e-5)


@families("gpt2", "opt")
def test_default_start_preserves_bfloat16(name):
    case = build(name)
    without_dropout(case.model)
    exact = run(case, case.model, case.model)
    case.model.to(torch.bfloat16).train()
    for key, value in case.inputs.items():
        if value.is_floating_point():
            case.inputs[key] = value.to(torch.bfloat16)
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options=EAGER)
    want = run(case, plain, plain)
    got = run(case, compiled, case.model)
    assert got.logits.dtype == torch.bfloat16
    assert distance(got.logits, want.logits) < 2e-2
    assert distance(got.loss, want.loss) < 2e-2
    # A ReLU whose input rounds to the other side of zero changes gradients by more than rounding
    # (OPT): where bfloat16 alone moves the plain model's gradient by more than 1 %, twice that is
    # allowed.
    floor = 1e-3 * max(gradient.double().norm().item() for gradient in want.gradients.values())
    for parameter, gradient in want.gradients.items():
        own = distance(gradient, exact.gradients[parameter], floor)
        assert distance(got.gradients[parameter], gradient, floor) < max(2e-2, 2 * own), parameter
    assert {c.phi.dtype for c in mhc_compile.connections(case.model).values()} == {torch.float32}


@pytest.mark.parametrize("streams", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 8))])
def test_default_start_preserves_at_any_number_of_streams(streams):
    case = build("gpt2", layers=1)
    case.model.train()
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options={"streams": streams, **EAGER})
    assert_same(run(case, compiled, case.model), run(case, plain, plain), 1e-5)
    assert {c.streams for c in mhc_compile.connections(case.model).values()} == {streams}


def test_identity_mapping_preserves():
    case = build("llama")
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options={"mapping": "identity", **EAGER})
    assert_same(run(case, compiled, case.model), run(case, plain, plain), 1e-5)
    connections = mhc_compile.connections(case.model).values()
    assert len(connections) == 2 * LAYERS
    for connection in connections:
        assert connection.phi.shape == (4 * 16, 2 * 4)  # no residual logits
        _, _, res = connection.coefficients(torch.randn(3, 4, 16))
        assert torch.equal(res, torch.eye(4).expand(3, 4, 4))


def test_scratch_start_is_another_function():
    case = build("gpt2")
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options={"init": "random", **EAGER})
    want, got = run(case, plain, plain), run(case, compiled, case.model)
    assert relative(got.logits, want.logits) > 1e-3
    connections = mhc_compile.connections(case.model).values()
    assert len(connections) == 2 * LAYERS
    for connection in connections:
        assert connection.phi.std().item() == pytest.approx((4 * 16) ** -0.5, rel=0.1)
        assert not connection.bias.any()


def test_dropout_draws_the_same_numbers():
    case = build("gpt2", layers=1)  # dropout 0.1 everywhere
    case.model.train()
    plain = twin(case.model)
    compiled = torch.compile(case.model, backend="mhc", options=EAGER)
    first, second = run(case, plain, plain, seed=1), run(case, plain, plain, seed=2)
    assert not torch.equal(first.logits, second.logits)
    assert_same(run(case, compiled, case.model, seed=2), second, 1e-5)
    assert len(mhc_compile.connections(case.model)) == 2


def test_autocast_keeps_coefficients_in_float32():
    case = build("gpt2")
    plain = twin(without_dropout(case.model))
    compiled = torch.compile(case.model, backend="mhc", options=EAGER)
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        want = run(case, plain, plain)
        got = run(case, compiled, case.model)
        seen = mhc_compile.stability(case.model, **case.inputs).chains
    assert_same(got, want, 2e-2)
    assert len(seen) == 1
    # A projection in bfloat16 would differ from the float32 one by three digits.
    connection = next(iter(mhc_compile.connections(case.model).values()))
    nn.init.normal_(connection.phi)
    streams = torch.randn(5, 4, 16)
    want_pre = connection.coefficients(streams)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got_pre = connection.coefficients(streams)[0]
    assert torch.equal(got_pre, want_pre)
