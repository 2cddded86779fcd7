"""The C++ of every mapping and convention, alone, against the eager form.

In the fused operators: `test_steps`.
"""

from __future__ import annotations

import pytest
import torch

import mhc_compile.ops  # noqa: F401 - registers the operators
from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.mappings import MAPPINGS, mapping_of
from mhc_compile.ops import cpu
from mhc_compile.ops.cpu.build import library

REALS = {torch.float32: "float", torch.float64: "double"}
TURNED = "sinkhorn;sinkhorn_eps=0.01;last=columns;gate_speed=1.5;scale_speed=0.75"
CASES = [
    ("permutations", 4, torch.float64),
    ("kronecker", 4, torch.float64),
    (TURNED, 3, torch.float64),
    *(
        pytest.param(mapping, n, dtype, marks=pytest.mark.slow)
        for dtype in REALS
        for mapping, sizes in (
            ("permutations", (1, 2, 3, 4)),
            ("kronecker", (1, 2, 4, 8)),
            ("unconstrained", (1, 3, 8)),
            ("identity", (1, 4)),
            ("sinkhorn", (4,)),
            ("sinkhorn;sinkhorn_eps=1e-06", (1, 4)),
            ("sinkhorn;last=columns", (4,)),
            (TURNED, (4, 8)),
        )
        for n in sizes
    ),
]


def kernel(spec: str, n: int, dtype: torch.dtype):
    """`(forward(logits), backward(grad, logits))` of the header, built for this test."""
    convention = parse(spec)
    definitions = {"SINKHORN_EPS": repr(convention.sinkhorn_eps), "LAST_COLUMNS": int(convention.last == "columns")}
    headers = ("lanes.h", f"{convention.mapping}.h", "alone.h")
    built = library(headers, COMPUTE=REALS[dtype], STREAMS=n, **definitions)
    assert built is not None

    def forward(logits, iterations):
        out = torch.full((len(logits), n, n), float("nan"), dtype=dtype)
        built.mapping_forward(logits, out, len(logits), iterations, 2)
        return out

    def backward(grad, logits, iterations):
        out = torch.full_like(logits, float("nan"))
        built.mapping_backward(grad, logits, out, len(logits), iterations, 2)
        return out

    return forward, backward


@pytest.mark.parametrize(("spec", "n", "dtype"), CASES)
def test_forward_and_backward_are_those_of_the_eager_form(spec, n, dtype):
    mapping, (forward, backward) = mapping_of(spec), kernel(spec, n, dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 4e-6
    for tokens, iterations, std in ((1, 20, 1.0), (16, 1, 3.0), (37, 5, 2.0), (40, 20, 30.0)):
        logits = std * torch.randn(tokens, mapping.logits(n), dtype=dtype)
        grad = torch.randn(tokens, n, n, dtype=dtype)
        for got, want in (
            (forward(logits, iterations), mapping.matrix(logits.double(), n, iterations)),
            (backward(grad, logits, iterations), mapping.backward(grad.double(), logits.double(), n, iterations)),
        ):
            assert got.shape == want.shape
            scale = max(1.0, *want.abs().flatten().tolist()) if want.numel() else 1.0
            assert torch.allclose(got.double(), want, rtol=0, atol=tolerance * scale), (tokens, iterations, std)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("permutations", 1e-6),
        pytest.param("kronecker", 1e-6, marks=pytest.mark.slow),
        pytest.param("sinkhorn;sinkhorn_eps=1e-06;last=columns", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_huge_logits_stay_finite_in_float32(spec, error):
    mapping, (forward, backward) = mapping_of(spec), kernel(spec, 4, torch.float32)
    for size in (1e2, 1e10, 3e38):
        logits = size * (2 * torch.rand(33, mapping.logits(4)) - 1)
        assert ((forward(logits, 20).sum(-2) - 1).abs() < error).all()
        assert backward(torch.randn(33, 4, 4), logits, 20).isfinite().all()


def test_every_mapping_has_a_header():
    assert set(MAPPINGS) == set(cpu.MAPPINGS)
    for mapping in cpu.MAPPINGS:
        assert cpu.takes(torch.float64, torch.float32, n=4, mapping=mapping) is False
    assert not cpu.takes(torch.float32, n=3, mapping="kronecker")  # which there is not, and nothing is built


def test_settings_that_a_mapping_ignores_make_no_new_library(monkeypatch):
    built = []
    monkeypatch.setattr(cpu.kernels, "library", lambda *_, **macros: built.append(macros))
    monkeypatch.setattr(cpu.kernels, "_BUILT", {})
    for convention in (
        Convention(mapping="kronecker"),
        Convention(mapping="kronecker", sinkhorn_eps=1e-6, last="columns"),
        Convention(mapping="kronecker", pre_eps=1e-6),
    ):
        cpu.takes(torch.float32, n=4, mapping=str(convention))
    assert built[0] == built[1] != built[2]


def test_operators_without_mapping_use_any_built_library(monkeypatch):
    built = []
    monkeypatch.setattr(cpu.kernels, "library", lambda headers, **macros: built.append(headers[2]) or headers)
    monkeypatch.setattr(cpu.kernels, "_BUILT", {})
    cpu.takes(torch.float32, n=4, mapping="kronecker")
    cpu.takes(torch.float32, n=4)
    cpu.takes(torch.float32, n=2)
    assert built == ["kronecker.h", "sinkhorn.h"]
