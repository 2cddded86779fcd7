"""The Triton kernels against double precision autograd.

Without a GPU they run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when Triton is imported. Where another test has been faster, this file has to be run
    # alone or with the variable set.
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402

from mhc_compile.errors import OptionError, ShapeError  # noqa: E402
from mhc_compile.ops import triton as kernels  # noqa: E402

EPS = 1e-6
# dtype of the streams, of the branch, and the largest error relative to the largest number of a
# result
PRECISIONS = [
    pytest.param(torch.float32, torch.float32, 2e-5, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, 2e-2, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, 2e-2, id="bfloat16-float32"),
    pytest.param(torch.float16, torch.float16, 4e-3, id="float16"),
]
# n, equal streams held once, leading axes, C
SHAPES = [
    pytest.param(4, False, (19,), 21, id="n4"),
    pytest.param(4, True, (2, 4), 30, id="n4-equal"),
    pytest.param(4, False, (17,), 140, id="n4-blocks"),
    pytest.param(1, False, (5,), 16, id="n1"),
    pytest.param(2, False, (2, 9), 13, id="n2"),
    pytest.param(3, False, (18,), 35, id="n3"),
    pytest.param(3, True, (4,), 20, id="n3-equal"),
    pytest.param(8, False, (5,), 24, id="n8"),
    pytest.param(4, False, (0, 3), 24, id="empty"),
]
# The same with another mapping, or one iteration
FEWER = [shape for shape in SHAPES if shape.id in {"n4", "n3-equal", "n2"}]


def project(logits, mapping, iterations, n):
    if mapping == "identity":
        return torch.eye(n, dtype=logits.dtype, device=logits.device).expand(*logits.shape[:-1], n, n)
    M = logits.unflatten(-1, (n, n))
    for _ in range(iterations):
        M = M - M.logsumexp(-2, keepdim=True)
        M = M - M.logsumexp(-1, keepdim=True)
    return M.exp()


def update(streams, branch, post, res):
    n = post.shape[-1]
    streams = streams.expand(*streams.shape[:-2], n, streams.shape[-1])
    return res @ streams + post[..., None] * branch[..., None, :]


def read(streams, phi, bias, scale, n, mapping, iterations):
    streams = streams.expand(*streams.shape[:-2], n, streams.shape[-1])
    flat = streams.flatten(-2)
    inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    z = (flat @ phi) * inverse
    parts = [n, n, z.shape[-1] - 2 * n]
    logits = [a * part + b for a, part, b in zip(scale, z.split(parts, -1), bias.split(parts, -1), strict=True)]
    pre, post = logits[0].sigmoid(), 2 * logits[1].sigmoid()
    res = project(logits[2], mapping, iterations, n)
    return (pre[..., None] * streams).sum(-2), pre, post, res, z, inverse


class Case:
    """Inputs of one site in the kernels' dtypes, and the same numbers in double precision with
    gradients.
    """

    def __init__(self, n, equal, lead, width, mapping="sinkhorn", dtype=torch.float32, branch_dtype=None):
        self.n, self.mapping = n, mapping
        columns = 2 * n + (n * n if mapping == "sinkhorn" else 0)
        wide = torch.float32

        def make(*shape, dtype=wide):
            return torch.randn(*shape, device=DEVICE).to(dtype)

        self.streams = make(*lead, 1 if equal else n, width, dtype=dtype)
        self.branch = make(*lead, width, dtype=branch_dtype or dtype)
        self.post, self.res = 2 * make(*lead, n).sigmoid(), make(*lead, n, n).softmax(-1)
        self.site = (make(n * width, columns) / width**0.5, make(columns), torch.tensor([0.9, 0.7, 1.1], device=DEVICE))

    def exact(self, *tensors):
        return [tensor.double().requires_grad_() for tensor in tensors]

    @property
    def mix(self):
        return self.streams, self.branch, self.post, self.res


def close_to(got, want, tolerance):
    assert len(got) == len(want)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, place
        assert a.is_contiguous(), place
        if b.numel():
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
            assert error < tolerance, (place, float(error))


def grads(outputs, given, inputs):
    """Gradients of double precision `inputs`; outputs whose gradient is None are left out."""
    used = [(o, g.double()) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
    if not used:
        return [torch.zeros_like(x) for x in inputs]
    results, seeds = zip(*used, strict=True)
    found = torch.autograd.grad(results, inputs, seeds, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def like(tensors):
    return [torch.randn(t.shape, device=DEVICE).to(t.dtype) for t in tensors]


@pytest.mark.parametrize(("n", "equal", "lead", "width"), SHAPES)
def test_read_and_step(n, equal, lead, width):
    check_site(Case(n, equal, lead, width), 20, 2e-5)


@pytest.mark.parametrize(("n", "equal", "lead", "width"), FEWER)
@pytest.mark.parametrize(("mapping", "iterations"), [("sinkhorn", 1), ("identity", 20)])
def test_one_iteration_and_another_mapping(n, equal, lead, width, mapping, iterations):
    check_site(Case(n, equal, lead, width, mapping), iterations, 2e-5)


@pytest.mark.parametrize(("dtype", "branch_dtype", "tolerance"), PRECISIONS[1:])
@pytest.mark.parametrize("equal", [False, True])
def test_read_and_step_in_half_width(equal, dtype, branch_dtype, tolerance):
    check_site(Case(4, equal, (11,), 70, "sinkhorn", dtype, branch_dtype), 4, tolerance)


def check_site(case, iterations, tolerance, absent=()):
    tail = (case.mapping, iterations)
    got = kernels.read(case.streams, *case.site, case.n, *tail, EPS)
    X, *site = case.exact(case.streams, *case.site)
    want = read(X, *site, case.n, *tail)
    close_to(got, want, tolerance)
    # Coefficients of narrow streams are as exact as their streams allow: a phi cut down to bfloat16
    # fails here.
    close_to(got[1:], want[1:], min(tolerance, 1e-3))
    assert got[0].dtype == case.streams.dtype
    assert {t.dtype for t in got[1:]} == {torch.float32}
    given = [None if k in absent else g for k, g in enumerate([got[0], got[2], got[3]])]
    given = [None if g is None else torch.randn_like(g) for g in given]
    found = kernels.read_backward(*given, case.streams, *case.site, got[1], got[2], got[4], got[5], *tail, EPS)
    close_to(found, grads([want[0], want[2], want[3]], given, [X, *site]), tolerance)
    assert [t.dtype for t in found] == [t.dtype for t in (case.streams, *case.site)]

    got = kernels.step(*case.mix, *case.site, *tail, EPS)
    exact = case.exact(*case.mix, *case.site)
    new = update(*exact[:4])
    want = [new, *read(new, *exact[4:], case.n, *tail)]
    close_to(got, want, tolerance)
    given = [None if k - 1 in absent else g for k, g in enumerate([got[0], got[1], got[3], got[4]])]
    given = [None if g is None else torch.randn_like(g) for g in given]
    saved = (got[2], got[3], got[5], got[6])
    found = kernels.step_backward(*given, *case.mix, *case.site, *saved, *tail, EPS)
    close_to(found, grads([want[0], want[1], want[3], want[4]], given, exact), tolerance)
    assert [t.dtype for t in found] == [t.dtype for t in (*case.mix, *case.site)]


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (-1,), (-1, 0, 1, 2), (0, 1, 2)])
@pytest.mark.parametrize("mapping", ["sinkhorn", "identity"])
def test_absent_gradients_are_zero(absent, mapping):
    check_site(Case(2, False, (6,), 20, mapping), 3, 2e-5, absent)


@pytest.mark.parametrize(("n", "equal", "lead", "width"), SHAPES)
@pytest.mark.parametrize("name", ["update", "close"])
def test_update_and_close(n, equal, lead, width, name):
    check_mix(Case(n, equal, lead, width), name, 2e-5)


@pytest.mark.parametrize(("dtype", "branch_dtype", "tolerance"), PRECISIONS[1:])
@pytest.mark.parametrize("name", ["update", "close"])
def test_update_and_close_in_half_width(name, dtype, branch_dtype, tolerance):
    check_mix(Case(4, False, (37,), 70, "sinkhorn", dtype, branch_dtype), name, tolerance)


def check_mix(case, name, tolerance):
    got = getattr(kernels, name)(*case.mix)
    exact = case.exact(*case.mix)
    want = update(*exact) if name == "update" else update(*exact).mean(-2)
    close_to([got], [want], tolerance)
    assert got.dtype == case.streams.dtype
    grad = torch.randn_like(got)
    found = getattr(kernels, f"{name}_backward")(grad, *case.mix)
    close_to(found, grads([want], [grad], exact), tolerance)
    assert [t.dtype for t in found] == [t.dtype for t in case.mix]


def test_strides_do_not_matter():
    case = Case(4, False, (6,), 20)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (*case.mix, *case.site[:1])]
    tail = (*case.site[1:], "sinkhorn", 3, EPS)
    for a, b in zip(kernels.step(*case.mix, case.site[0], *tail), kernels.step(*turned, *tail), strict=True):
        assert torch.equal(a, b)


def test_wild_logits_stay_finite():
    """Sinkhorn of logits of size 100: the first round is done on logarithms, the gradient does not
    overflow.
    """
    case = Case(4, False, (16,), 16)
    phi, bias, _ = case.site
    case.site = (phi, 100 * bias, torch.full((3,), 40.0, device=DEVICE))
    *_, res, z, inverse = got = kernels.read(case.streams, *case.site, 4, "sinkhorn", 20, EPS)
    assert torch.allclose(res.sum(-1), torch.ones_like(res[..., 0]), atol=1e-5)
    given = [torch.randn_like(t) for t in (got[0], got[2], got[3])]
    found = kernels.read_backward(*given, case.streams, *case.site, got[1], got[2], z, inverse, "sinkhorn", 20, EPS)
    assert all(t.isfinite().all() for t in found)


def test_the_same_bits_every_time():
    case = Case(4, False, (20,), 70)
    out = kernels.step(*case.mix, *case.site, "sinkhorn", 20, EPS)
    given = [torch.randn_like(out[k]) for k in (0, 1, 3, 4)]
    runs = [
        kernels.step_backward(*given, *case.mix, *case.site, out[2], out[3], out[5], out[6], "sinkhorn", 20, EPS)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rejected_inputs_restate_shape_and_dtype():
    case = Case(4, False, (3,), 8)
    with pytest.raises(ShapeError, match=r"streams \[3, 4, 8\] float64.*expected float32"):
        kernels.update(case.streams.double(), *case.mix[1:])
    with pytest.raises(ShapeError, match=r"n = 9.*1 <= n <= 8"):
        kernels.read(torch.zeros(2, 1, 8), *case.site, 9, "sinkhorn", 20, EPS)
    with pytest.raises(OptionError, match=r"'magic' has no kernel"):
        kernels.read(case.streams, *case.site, 4, "magic", 20, EPS)


def test_interpreter_runs_without_a_gpu():
    assert kernels.available()
    assert triton.knobs.runtime.interpret == (DEVICE == "cpu")
