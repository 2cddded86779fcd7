"""The lazy operators against the equations and their autograd, written out in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.lazy_oracle import EPS, HOW, ITERATIONS, N, close, incoming, oracle, values
from helpers.norms import norms, of_backward

from mhc_compile import mappings
from mhc_compile.errors import ShapeError
from mhc_compile.ops import cpu
from mhc_compile.ops import lazy_reference as lazy

mhc = torch.ops.mhc


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("width", "tokens"), [(6, (2, 3)), (33, (70,)), (130, (5, 4)), (1, (1,))])
def test_steps_and_closes_are_the_equations(width, tokens, copies):
    for sites in range(1, lazy.LONGEST["cpu"] + 2):  # the last has no kernel
        tensors, norm = values(sites, width, tokens, copies=copies), norms(width)[sites % 3]
        (after, *rest), wanted = oracle(tensors, grads := incoming(width, tokens), norm)
        assert cpu.takes_lazy(tensors[0], tensors[1], N, "sinkhorn") == (sites <= lazy.LONGEST["cpu"])
        for kernels in (lazy, SimpleNamespace(**cpu.OPERATORS)):
            for write in (False, True):
                streams, h, pre, *got, moments = kernels.lazy_step(*tensors, write, *HOW, *norm)
                assert all(close(one, other, 1e-12) for one, other in zip((h, *got[:2]), rest, strict=True))
                assert close(streams, after, 1e-12) if write else streams.shape == (0,)
            if sites == 1:
                continue
            saved = pre, got[0], got[2], got[3], *HOW, *of_backward(norm, moments)
            gradients = [one for one in kernels.lazy_step_backward(*grads, *tensors, *saved) if len(one)]
            assert all(close(one, other, 1e-10) for one, other in zip(gradients, wanted, strict=True))
            assert close(kernels.lazy_close(*tensors[:4]), after.mean(-2), 1e-12)
            from_mean = oracle(tensors, [grads[1].unsqueeze(-2).expand_as(after) / N, None, None, None])[1][:4]
            gradients = kernels.lazy_close_backward(grads[1], *tensors[:4])
            assert all(close(one, other, 1e-11) for one, other in zip(gradients, from_mean, strict=True))


@pytest.mark.parametrize("absent", range(4))
def test_absent_gradients_are_zero(absent):
    tensors, grads = values(3, 33, (7,)), incoming(33, (7,))
    grads[absent] = None
    norm = norms(33)[2]
    _, _, pre, post, _, z, inverse, moments = cpu.OPERATORS["lazy_step"](*tensors, False, *HOW, *norm)
    for kernels in (lazy, SimpleNamespace(**cpu.OPERATORS)):
        got = kernels.lazy_step_backward(*grads, *tensors, pre, post, z, inverse, *HOW, *of_backward(norm, moments))
        assert all(close(one, other, 1e-10) for one, other in zip(got, oracle(tensors, grads, norm)[1], strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 2e-5, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        pytest.param(torch.float16, 3e-3, marks=pytest.mark.slow),
    ],
)
def test_narrow_dtypes_are_near_the_equations(dtype, tolerance):
    tensors = values(4, 70, (600,), dtype=dtype)
    wide = [[one.double() for one in t] if isinstance(t, list) else t.double() for t in tensors]
    grads = [grad.to(dtype if i < 2 else torch.float32) for i, grad in enumerate(incoming(70, (600,)))]
    results, wanted = oracle(wide, [grad.double() for grad in grads])
    streams, h, pre, post, res, z, inverse, _ = mhc.lazy_step(*tensors, True, *HOW)
    assert streams.dtype == h.dtype == dtype
    assert all(close(one, other, tolerance) for one, other in zip((streams, h, post, res), results, strict=True))
    *got, _, _ = mhc.lazy_step_backward(*grads, *tensors, pre, post, z, inverse, *HOW)
    assert all(close(one, other, tolerance) for one, other in zip(got, wanted, strict=True))


def test_the_number_of_threads_changes_no_row(monkeypatch):
    tensors, grads = values(2, 5, (1200,)), incoming(5, (1200,))
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(cpu.operators, "threads_for", lambda tokens, threads=threads: threads)
        step = cpu.OPERATORS["lazy_step"](*tensors, True, *HOW)
        *back, _, _ = cpu.OPERATORS["lazy_step_backward"](*grads, *tensors, *(step[i] for i in (2, 3, 5, 6)), *HOW)
        assert all(close(one, other, 1e-12) for one, other in zip(back[4:], oracle(tensors, grads)[1][4:], strict=True))
        results.append((*step, *back[:4]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("copies", [False, True])
def test_opcheck(copies):
    *old, phi, bias, scale = values(2, 6, (3,), copies=copies)
    tensors, grads = (*old, phi.float(), bias, scale), incoming(6, (3,))
    checks = ("test_schema", "test_faketensor")
    norm = norms(6)[2]
    for write in (False, True):
        torch.library.opcheck(mhc.lazy_step.default, (*tensors, write, *HOW, *norm), test_utils=checks)
    _, _, pre, post, _, z, inverse, moments = mhc.lazy_step(*tensors, False, *HOW, *norm)
    arguments = (*grads, *tensors, pre, post, z, inverse, *HOW, *of_backward(norm, moments))
    torch.library.opcheck(mhc.lazy_step_backward.default, arguments, test_utils=checks)
    torch.library.opcheck(mhc.lazy_close.default, tensors[:4], test_utils=checks)
    torch.library.opcheck(mhc.lazy_close_backward.default, (grads[1], *tensors[:4]), test_utils=checks)


def test_errors_name_the_lists_and_the_way_out():
    streams, branches, post, res, *site = values(1, 6, (3,))
    with pytest.raises(
        ShapeError, match=r"mhc::lazy_close: .* at least 2 sites; got 1, 1, 1 \(mhc::close is for one site\)"
    ):
        mhc.lazy_close(streams, branches, post, res)
    with pytest.raises(ShapeError, match=r"mhc::lazy_step: .* got 1, 0, 1"):
        mhc.lazy_step(streams, branches, [], res, *site, True, *HOW)
    with pytest.raises(ShapeError, match=r"mhc::lazy_step: streams .* need branch \[\.\.\., C\]"):
        mhc.lazy_step(streams, [branches[0][..., :-1]], post, res, *site, True, *HOW)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    ("n", "mapping"),
    [
        (1, "sinkhorn"),
        (2, "unconstrained"),
        (3, "permutations"),
        (8, "kronecker"),
        (8, "sinkhorn"),
        (4, "identity;pre_eps=0.02;post_eps=0.1"),
        (
            4,
            "sinkhorn;pre_eps=0.02;post_range=3.0;post_eps=0.1;sinkhorn_eps=0.01;last=columns;gate_speed=1.5;scale_speed=0.75",
        ),
    ],
)
def test_every_mapping_and_number_of_streams(n, mapping, copies):
    """The kernels against the compositions, which share nothing with them."""
    how, columns = (mapping, ITERATIONS, EPS), mappings.columns(mapping.split(";")[0], n)

    def draw(*shape):
        return torch.randn(37, *shape, dtype=torch.float64)

    for sites in range(1, lazy.LONGEST["cpu"] + 1):
        lists = [draw(33) for _ in range(sites)], [draw(n) for _ in range(sites)], [draw(n, n) for _ in range(sites)]
        phi = torch.randn(n * 33, columns, dtype=torch.float64) / 6
        site = phi, torch.randn(columns, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
        tensors = (draw(1 if copies else n, 33), *lists, *site)
        assert cpu.takes_lazy(tensors[0], lists[0], n, mapping)
        grads = draw(n, 33), draw(33), draw(n), draw(n, n)
        found = []
        for kernels in (lazy, SimpleNamespace(**cpu.OPERATORS)):
            step = kernels.lazy_step(*tensors, True, *how)
            if sites > 1:
                saved = (step[i] for i in (2, 3, 5, 6))
                step = (*step, *kernels.lazy_step_backward(*grads, *tensors, *saved, *how))
            found.append(step)
        for one, other in zip(*found, strict=True):
            assert close(one, other, 1e-10)
