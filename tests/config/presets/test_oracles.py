"""Every preset against the module that ships it, with that module's own parameters: outputs and all
gradients.
"""

from __future__ import annotations

import pytest
import torch
from helpers.reference_modules import ITERATIONS, NATIVES, WIDTH, N, Native
from torch import Tensor

from mhc_compile import Options
from mhc_compile.config.presets import get_preset
from mhc_compile.mappings import mapping_of
from mhc_compile.modules.gated import create_connection

TOKENS = (2, 5)


@pytest.fixture
def in_double(monkeypatch):
    """The modules cast to float32 inside, by `.float()`: so they compute in float64 instead."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def settings(native: Native) -> Options:
    rank = {"rank": 3} if native.preset == "qwen4-exp" else {}
    return Options.parse({"preset": native.preset, "init": "random", "streams": N, "iterations": ITERATIONS, **rank})


def our_site(native: Native, streams: Tensor, branch) -> Tensor:
    """The operators on the native parameters, so that gradients arrive at these."""
    options = settings(native)
    phi, second, third = native.ours()
    if options.rank:
        h, post, res = torch.ops.mhc.gated_read(streams, phi, second, third, options.eps)
    else:
        pre, post, res, _ = torch.ops.mhc.coefficients(
            streams, phi, second, third, options.spec, options.iterations, options.eps
        )
        h = torch.ops.mhc.collapse(streams, pre)
    return torch.ops.mhc.update(streams, branch(h), post, res)


def our_end(native: Native, streams: Tensor) -> Tensor:
    preset = get_preset(native.preset)
    if native.ours_end is None:
        assert preset.read_out == "mean"
        return streams.mean(-2)
    assert preset.read_out == "learned"
    first, second, third = native.ours_end()
    if preset.convention.rank:
        return torch.ops.mhc.gated_read_out(streams, first, second, third, preset.eps)
    return torch.ops.mhc.read_out(streams, first, second, third, preset.convention.pre_eps, preset.eps)


def graded(run, native: Native, streams: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """A result and the gradients of everything that went into it."""
    leaf = streams.detach().clone().requires_grad_()
    out = run(leaf)
    for parameter in native.parameters.values():
        parameter.grad = None
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in native.parameters.items() if p.grad is not None}
    return {"out": out.detach(), "streams": leaf.grad, **{name: grad.clone() for name, grad in grads.items()}}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {
        name: ((got[name].double() - want[name].double()).abs().max() / want[name].double().abs().max()).item()
        for name in want
    }


def pairs(native: Native, streams: Tensor):
    """(ours, theirs, weight of the result) for the site and, where there is one, the read-out."""
    torch.manual_seed(1)
    matrix = torch.randn(WIDTH, WIDTH, dtype=torch.float64).to(streams.dtype)

    def branch(h: Tensor) -> Tensor:
        return torch.tanh(h @ matrix)

    yield lambda x: our_site(native, x, branch), lambda x: native.run(x, branch), streams.shape
    if native.end is not None:
        yield lambda x: our_end(native, x), native.end, (*TOKENS, WIDTH)


def made(name: str, dtype: torch.dtype) -> tuple[Native, Tensor]:
    torch.manual_seed(0)
    native = NATIVES[name]()
    for parameter in native.parameters.values():
        parameter.data = parameter.data.to(dtype)
    return native, torch.randn(*TOKENS, N, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("name", NATIVES)
def test_equal_in_float64(name, in_double):
    native, streams = made(name, torch.float64)
    for ours, theirs, shape in pairs(native, streams):
        weight = torch.randn(shape, dtype=torch.float64)
        errors = worst(graded(ours, native, streams, weight), graded(theirs, native, streams, weight))
        assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("name", NATIVES)
def test_as_near_in_bfloat16_as_the_module_that_ships_it(name, monkeypatch):
    """Streams in bfloat16, parameters in what the module can take: our error against float64 is at
    most that of the module, but for chance.
    """
    native, streams = made(name, torch.bfloat16 if name == "qwen4-exp" else torch.float32)
    rounded = streams.to(torch.bfloat16)
    weights = {shape: torch.randn(shape, dtype=torch.float64) for *_, shape in pairs(native, streams)}
    got = [
        (graded(ours, native, rounded, weights[shape]), graded(theirs, native, rounded, weights[shape]))
        for ours, theirs, shape in pairs(native, rounded)
    ]
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for parameter in native.parameters.values():
        parameter.grad, parameter.data = None, parameter.data.double()
    exact = [
        graded(theirs, native, rounded.double(), weights[shape]) for _, theirs, shape in pairs(native, rounded.double())
    ]
    for (ours, theirs), want in zip(got, exact, strict=True):
        mine, other = worst(ours, want), worst(theirs, want)
        assert max(mine.values()) < 0.06, mine
        assert sum(mine.values()) <= 1.25 * sum(other.values()) + 1e-3, (mine, other)


@pytest.mark.parametrize("name", NATIVES)
def test_hyper_connection_module_computes_what_the_operators_compute(name):
    native, streams = made(name, torch.float64)
    connection = create_connection(WIDTH, settings(native), dtype=torch.float64, last=True)
    for parameter, value in zip((getattr(connection, n) for n in connection.names), native.ours(), strict=True):
        assert parameter.shape == value.shape
        parameter.data = value.detach().clone()
    assert torch.equal(connection(streams, torch.tanh), our_site(native, streams, torch.tanh))
    if native.ours_end is not None:
        end = connection.read_out
        for parameter, value in zip((getattr(end, n) for n in end.names), native.ours_end(), strict=True):
            assert parameter.shape == value.shape
            parameter.data = value.detach().clone()
        assert torch.equal(end(streams), our_end(native, streams))


def test_sinkhorn_of_the_package_hyper_connections(in_double):
    package = pytest.importorskip("hyper_connections.manifold_constrained_hyper_connections")
    logits = torch.randn(*TOKENS, N * N, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*TOKENS, N, N, dtype=torch.float64)
    want = package.sinkhorn_knopps(logits.unflatten(-1, (N, N)), iters=ITERATIONS)
    got = torch.ops.mhc.sinkhorn(logits.unflatten(-1, (N, N)), ITERATIONS)
    gradients = [torch.autograd.grad((out * weight).sum(), logits)[0] for out in (got, want)]
    assert (got - want).abs().max() < 1e-13
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "spec", ["sinkhorn;sinkhorn_eps=1e-06", "sinkhorn;last=columns", "sinkhorn;sinkhorn_eps=0.01;last=columns"]
)
def test_the_side_that_is_normalised_last_is_exact(spec):
    mapping = mapping_of(spec)
    logits = 3 * torch.randn(50, N * N, dtype=torch.float64)
    matrix = mapping.matrix(logits, N, ITERATIONS)
    rows, columns = (matrix.sum(axis).sub(1).abs().max().item() for axis in (-1, -2))
    exact, other = (columns, rows) if "columns" in spec else (rows, columns)
    assert exact < 2 * float(0.01 if "0.01" in spec else 1e-6)
    assert other > 1e-3


def test_gradcheck_with_an_epsilon_and_columns_last():
    for spec in (
        "sinkhorn;sinkhorn_eps=0.01",
        "sinkhorn;last=columns",
        "sinkhorn;pre_eps=0.1;post_range=3.0;post_eps=0.2",
    ):
        streams = torch.randn(3, N, 2, dtype=torch.float64, requires_grad=True)
        parameters = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((N * 2, 2 * N + N * N), (2 * N + N * N,), (3,))
        ]

        def weights(*tensors: Tensor, spec: str = spec) -> tuple[Tensor, ...]:
            return torch.ops.mhc.coefficients(*tensors, spec, 5, 1e-6)[:3]

        assert torch.autograd.gradcheck(weights, (streams, *parameters))
