"""Sinkhorn: the values, and the hand-derived gradient against autograd through the unrolled
loop.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mhc_compile.ops  # noqa: F401 - registers the operators

sinkhorn = torch.ops.mhc.sinkhorn
STD = [0.1, 1.0, 3.0, 10.0]
N = [3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))]


def unrolled(logits: Tensor, iterations: int) -> Tensor:
    M = logits.exp()
    for _ in range(iterations):
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    return M


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("std", STD)
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_values_and_gradient_equal_the_unrolled_loop(std, n, iterations):
    logits = (std * torch.randn(3, 7, n, n, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(3, 7, n, n, dtype=torch.float64)
    want = unrolled(logits, iterations)
    (want_gradient,) = torch.autograd.grad((want * weight).sum(), logits)
    got = sinkhorn(logits, iterations)
    (got_gradient,) = torch.autograd.grad((got * weight).sum(), logits)
    assert (got - want).abs().max() < 1e-13
    assert (got_gradient - want_gradient).abs().max() < 1e-12


@pytest.mark.parametrize("std", STD)
def test_float32_is_close_to_float64_and_finite(std):
    logits = (std * torch.randn(4096, 4, 4)).requires_grad_()
    weight = torch.randn(4096, 4, 4)
    got = sinkhorn(logits, 20)
    (gradient,) = torch.autograd.grad((got * weight).sum(), logits)
    wide = logits.detach().double().requires_grad_()
    want = unrolled(wide, 20)
    (want_gradient,) = torch.autograd.grad((want * weight.double()).sum(), wide)
    assert (got - want).abs().max() < 5e-6
    assert (gradient - want_gradient).abs().max() < 2e-5
    assert (got.sum(-1) - 1).abs().max() < 1e-6  # rows are last, and exact


@pytest.mark.parametrize("size", [50.0, 500.0, 1e4, 1e30])
def test_no_inf_and_no_nan_at_any_finite_logits(size):
    logits = (size * torch.randn(512, 4, 4)).requires_grad_()
    naive = unrolled(logits, 20)
    assert not naive.isfinite().all() or size < 100  # the loop as the paper writes it breaks; ours must not
    got = sinkhorn(logits, 20)
    (gradient,) = torch.autograd.grad((got * torch.randn_like(got)).sum(), logits)
    assert got.isfinite().all()
    assert gradient.isfinite().all()
    assert (got.sum(-1) - 1).abs().max() < 1e-5


def test_a_row_that_underflows_as_a_whole_still_sums_to_one():
    logits = torch.zeros(1, 4, 4)
    logits[0, 2] = -300.0
    got = sinkhorn(logits, 20)
    assert torch.allclose(got, torch.full_like(got, 0.25), atol=1e-6)


def test_gradcheck():
    logits = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 3), (logits,))


def test_columns_converge_and_rows_are_exact():
    logits = torch.randn(100, 4, 4, dtype=torch.float64)
    error = [(sinkhorn(logits, k).sum(-2) - 1).abs().max().item() for k in (1, 5, 20)]
    assert error[0] > 1e-2 > error[1] > error[2]
    assert (sinkhorn(logits, 1).sum(-1) - 1).abs().max() < 1e-12


def test_strided_and_empty_inputs():
    logits = torch.randn(4, 4, 6, 5).permute(3, 2, 0, 1)
    assert torch.allclose(sinkhorn(logits, 20), sinkhorn(logits.contiguous(), 20))
    empty = torch.randn(0, 4, 4, requires_grad=True)
    out = sinkhorn(empty, 20)
    out.sum().backward()
    assert out.shape == (0, 4, 4)
    assert empty.grad.shape == (0, 4, 4)


def test_second_derivatives_are_rejected_in_words():
    logits = torch.randn(2, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(sinkhorn(logits, 5).square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()
