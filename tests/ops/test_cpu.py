"""The CPU kernel against the eager form, and what happens without a compiler."""

from __future__ import annotations

import logging

import pytest
import torch

from mhc_compile.mappings import sinkhorn as eager
from mhc_compile.ops import cpu


@pytest.mark.parametrize("n", [3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_kernel_equals_the_eager_form(n, dtype, tolerance):
    for tokens, iterations, std in (
        (1, 20, 1.0),
        (16, 1, 3.0),
        (17, 2, 10.0),
        (1501, 20, 1.0),
        (0, 20, 1.0),
        (40, 20, 100.0),
    ):
        logits = std * torch.randn(tokens, n, n, dtype=dtype)
        grad = torch.randn_like(logits)
        for got, want in (
            (cpu.sinkhorn(logits, iterations), eager.sinkhorn(logits.double(), iterations)),
            (
                cpu.sinkhorn_backward(grad, logits, iterations),
                eager.sinkhorn_backward(grad.double(), logits.double(), iterations),
            ),
        ):
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert got.shape == want.shape
            assert torch.allclose(got.double(), want, rtol=0, atol=tolerance), (tokens, iterations, std)


def test_kernel_runs():
    """The C++ compiler is a requirement of Inductor on CPU and of these tests.

    Rounding tells the two apart: if the operator ran the eager form here, the first comparison
    would fail.
    """
    logits = torch.randn(4096, 4, 4)
    assert torch.equal(torch.ops.mhc.sinkhorn(logits, 20), cpu.sinkhorn(logits, 20))
    assert not torch.equal(eager.sinkhorn(logits, 20), cpu.sinkhorn(logits, 20))


def test_strides_do_not_matter():
    logits = torch.randn(4, 4, 33).permute(2, 1, 0)
    grad = torch.randn(33, 4, 4).transpose(-1, -2)
    assert torch.equal(cpu.sinkhorn(logits, 20), cpu.sinkhorn(logits.contiguous(), 20))
    assert torch.equal(
        cpu.sinkhorn_backward(grad, logits, 20), cpu.sinkhorn_backward(grad.contiguous(), logits.contiguous(), 20)
    )


def test_the_number_of_threads_does_not_change_a_bit():
    logits, grad = torch.randn(2, 5000, 4, 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((cpu.sinkhorn(logits, 20), cpu.sinkhorn_backward(grad, logits, 20)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_without_a_compiler_the_eager_form_runs_with_a_warning(monkeypatch, caplog):
    from mhc_compile import _torch

    def broken(source):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_torch, "load_cpp", broken)
    cpu.build.library.cache_clear()
    try:
        logits = torch.randn(5, 4, 4)
        with caplog.at_level(logging.WARNING, logger="mhc_compile.ops.cpu"):
            assert torch.equal(cpu.sinkhorn(logits, 20), eager.sinkhorn(logits, 20))
            cpu.sinkhorn(logits, 20)
        assert [record.getMessage() for record in caplog.records] == [
            "the CPU kernels could not be built, eager operations are used instead: no compiler"
        ]
    finally:
        cpu.build.library.cache_clear()
