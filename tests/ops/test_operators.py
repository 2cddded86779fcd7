"""The operators: registrations, gradients, decompositions, and errors in words."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.errors import ShapeError
from mhc_compile.mappings import MAPPINGS, columns
from mhc_compile.ops import decompositions, reference

mhc = torch.ops.mhc
N, C = 4, 6


def site(n=N, width=C, dtype=torch.float64, mapping="sinkhorn", tokens=(2, 3)):
    k = 2 * n + MAPPINGS[mapping].logits(n)

    def make(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    streams, phi, bias, scale = make(*tokens, n, width), make(n * width, k), make(k), make(3)
    return streams, phi, bias, scale, mapping, 20, 1e-6


def mixing(dtype=torch.float64, tokens=(2, 3), n=N, width=C):
    wide = torch.promote_types(dtype, torch.float32)
    streams, branch = (
        torch.randn(*tokens, *shape, dtype=dtype, requires_grad=True) for shape in ((n, width), (width,))
    )
    pre, post, res = (torch.randn(*tokens, *shape, dtype=wide, requires_grad=True) for shape in ((n,), (n,), (n, n)))
    return streams, branch, pre, post, res


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapping", sorted(MAPPINGS))
def test_opcheck_coefficients(dtype, mapping):
    torch.library.opcheck(mhc.coefficients.default, site(dtype=dtype, mapping=mapping))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_opcheck_the_rest(dtype):
    streams, branch, pre, post, res = mixing(dtype)
    torch.library.opcheck(mhc.collapse.default, (streams, pre))
    torch.library.opcheck(mhc.update.default, (streams, branch, post, res))
    torch.library.opcheck(mhc.sinkhorn.default, (res, 20))
    torch.library.opcheck(mhc.declare.default, (torch.randn(2, 2, requires_grad=True), torch.randn(2), torch.randn(3)))


@pytest.mark.parametrize(
    ("mapping", "n"),
    [
        pytest.param(mapping, n, marks=pytest.mark.slow if mapping == "sinkhorn" and n != 3 else ())
        for mapping in sorted(MAPPINGS)
        for n in (1, 2, 3, 8)
        if columns(mapping, n)
    ],
)
def test_gradcheck_coefficients(mapping, n):
    *tensors, name, iterations, eps = site(n=n, width=2, mapping=mapping, tokens=(2,))
    assert torch.autograd.gradcheck(lambda *x: mhc.coefficients(*x, name, iterations, eps), tensors, fast_mode=n > 4)


def test_gradcheck_mixing():
    streams, branch, pre, post, res = mixing()
    assert torch.autograd.gradcheck(mhc.collapse, (streams, pre))
    assert torch.autograd.gradcheck(mhc.update, (streams, branch, post, res))


def test_equations():
    streams, branch, pre, post, res = mixing()
    assert torch.allclose(mhc.collapse(streams, pre), torch.einsum("...n,...nc->...c", pre, streams))
    want = torch.einsum("...ij,...jc->...ic", res, streams) + torch.einsum("...i,...c->...ic", post, branch)
    assert torch.allclose(mhc.update(streams, branch, post, res), want)


# Every number of streams is a library of its own, which takes seconds to build.
@pytest.mark.parametrize("n", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6, 7, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_forms_equal_the_eager_kernels(n, dtype):
    tokens, width = (3, 1, 5), 7
    streams, branch, pre, post, res = (t.detach() for t in mixing(dtype, tokens, n, width))
    grad = torch.randn_like(streams)
    small = torch.randn_like(branch)
    table = decompositions()
    for operator, args in (
        (mhc.collapse.default, (streams, pre)),
        (mhc.collapse_backward.default, (small, streams, pre)),
        (mhc.update.default, (streams, branch, post, res)),
        (mhc.update_backward.default, (grad, streams, branch, post, res)),
    ):
        got, want = table[operator](*args), operator(*args)
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one.float(), other.float(), rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_coefficients_are_float32_for_bfloat16_streams():
    streams, *rest = site(dtype=torch.bfloat16)
    for value in mhc.coefficients(streams, *rest):
        assert value.dtype == torch.float32
    streams, phi, *rest = site(dtype=torch.float32)
    exact = mhc.coefficients(streams.double(), phi.double(), *(r.double() for r in rest[:2]), *rest[2:])
    close = mhc.coefficients(streams, phi, *rest)
    for one, other in zip(close, exact, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)


def test_decompositions_leave_plain_aten():
    streams, phi, bias, scale, *static = site(dtype=torch.float32)
    branch = torch.randn(2, 3, C)

    def step(streams, phi, bias, scale, branch):
        pre, post, res, _ = mhc.coefficients(streams, phi, bias, scale, *static)
        new = mhc.update(streams, branch + mhc.collapse(streams, pre), post, res)
        return torch.autograd.grad(new.square().sum(), (streams, phi, bias, scale, branch))

    inputs = (streams, phi, bias, scale, branch.requires_grad_())
    kept = make_fx(step)(*inputs)
    assert any(str(node.target).startswith("mhc.") for node in kept.graph.nodes)
    plain = make_fx(step, decomposition_table=decompositions())(*inputs)
    assert {str(node.target).split(".")[0] for node in plain.graph.nodes if node.op == "call_function"} <= {
        "aten",
        "prims",
    }
    for one, other in zip(plain(*inputs), step(*inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_empty_batch():
    streams, phi, bias, scale, *static = site(tokens=(0, 3))
    pre, post, res, _ = mhc.coefficients(streams, phi, bias, scale, *static)
    branch = torch.randn(0, 3, C, dtype=torch.float64)
    (mhc.update(streams, branch, post, res).sum() + mhc.collapse(streams, pre).sum()).backward()
    assert streams.grad.shape == streams.shape
    assert phi.grad.shape == phi.shape
    assert not phi.grad.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"phi": (5, 24)},
            r"4 streams \[2, 3, 4, 6\] float64 and mapping 'sinkhorn' need phi \[24, 24\].* got \[5, 24\] float64",
        ),
        ({"bias": (7,)}, r"bias \[24\] and scale \[3\]; got \[24, 24\] float64, \[7\] float64 and \[3\]"),
        ({"streams": (4, 6)}, r"streams must be floating point \[..., n, C\] with a token axis, got \[4, 6\]"),
    ],
)
def test_wrong_shapes_are_named(change, words):
    values = dict(zip(("streams", "phi", "bias", "scale"), site(), strict=False))
    values |= {name: torch.randn(*shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(ShapeError, match=words):
        mhc.coefficients(*values.values(), "sinkhorn", 20, 1e-6)


def test_integer_streams_and_wrong_mixing_are_named():
    streams, branch, pre, post, res = mixing()
    with pytest.raises(ShapeError, match="floating point"):
        mhc.coefficients(torch.ones(2, 3, 4, 6, dtype=torch.long), *site()[1:])
    with pytest.raises(ShapeError, match=r"mhc::update: streams \[2, 3, 4, 6\] float64 need"):
        mhc.update(streams, branch[..., :2], post, res)
    with pytest.raises(ShapeError, match=r"mhc::collapse: .* got \[2, 3, 3\]"):
        mhc.collapse(streams, pre[..., :3])


def test_update_takes_coefficients_that_are_narrower_than_the_streams():
    """A trunk that is cast between the projection and the sum: float32 coefficients, float64
    streams.
    """
    torch.manual_seed(0)
    streams = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    post, res = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    inputs = (streams, branch, post, res)
    want = res.double() @ streams + post.double().unsqueeze(-1) * branch.unsqueeze(-2)
    wanted = torch.autograd.grad(want.pow(2).sum(), inputs)
    for update in (torch.ops.mhc.update, reference.update_fused):
        got = update(*inputs)
        assert got.dtype == torch.float64
        assert torch.allclose(got, want, atol=1e-12)
        for one, other in zip(torch.autograd.grad(got.pow(2).sum(), inputs), wanted, strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one, other, rtol=1e-5)
    torch.library.opcheck(torch.ops.mhc.update.default, inputs)
