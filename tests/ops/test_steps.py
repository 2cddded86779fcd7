"""The fused operators: the composition against autograd of the reference operators, the C++ kernels
against the composition.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.norms import by_torch, norms, of_backward, weights_of

from mhc_compile.errors import ShapeError
from mhc_compile.mappings import MAPPINGS, mapping_of
from mhc_compile.ops import cpu, decompositions, fused_decompositions, reference
from mhc_compile.ops import fused_reference as fused

mhc = torch.ops.mhc
KERNELS = SimpleNamespace(**cpu.OPERATORS)
HOW = ("sinkhorn", 20, 1e-6)
#: Fewer tokens than the kernels need to pack phi, and once more (`FEW` of projection.h).
SHAPES = [((2, 3), 6), ((37,), 33), ((5, 13), 130), ((1,), 1)]


#: Conventions in which every setting differs from the paper's.
TURNED = (
    "sinkhorn;pre_eps=0.02;post_range=3.0;post_eps=0.1;sinkhorn_eps=0.01;last=columns;gate_speed=1.5;scale_speed=0.75"
)
DEEPSEEK = "sinkhorn;pre_eps=1e-06;sinkhorn_eps=1e-06"


def columns(n, mapping):
    return 2 * n + mapping_of(mapping).logits(n)


#: Positions of the results that have a gradient, and of those that the backward gets.
DIFFERENTIABLE = {"step": (0, 1, 3, 4), "shifted_step": (0, 1, 2, 3, 4), "mix_read": (0, 1)}
SAVED = {"step": (2, 3, 5, 6), "shifted_step": (2, 3, 5, 6), "mix_read": ()}


def values(
    n=4, width=6, tokens=(2, 3), dtype=torch.float64, mapping="sinkhorn", copies=False, branch=None, name="step"
):
    """`(streams, branch, post, res, phi, bias, scale)` for `mhc::step`, with `pre` after `res` for
    the operators that take it; one stream for n equal ones with `copies`.
    """
    real, k = torch.promote_types(dtype, torch.float32), columns(n, mapping)
    old = (
        torch.randn(*tokens, 1 if copies else n, width, dtype=dtype),
        torch.randn(*tokens, width, dtype=branch or dtype),
        2 * torch.rand(*tokens, n, dtype=real),
        torch.softmax(torch.randn(*tokens, n, n, dtype=real), -1),
    )
    site = (
        0.3 * torch.randn(n * width, k, dtype=real) / width**0.5,
        torch.randn(k, dtype=real),
        0.5 + torch.rand(3, dtype=real),
    )
    given = () if name == "step" else (torch.rand(*tokens, n, dtype=real),)
    return *old, *given, *(site if name != "mix_read" else ())


def settings(name, mapping="sinkhorn", iterations=20):
    return () if name == "mix_read" else (mapping, iterations, 1e-6)


def by_reference(name, streams, branch, post, res, *rest, norm=()):
    """The differentiable results of an operator, by the equations and `mhc::coefficients`, whose
    gradients are tested elsewhere.
    """
    wide = streams.expand(*streams.shape[:-2], post.shape[-1], -1)
    after = torch.einsum("...ij,...jc->...ic", res, wide) + post.unsqueeze(-1) * branch.unsqueeze(-2)
    given, site = (rest[:1], rest[1:]) if name != "step" else ((), rest)
    found = mhc.coefficients(after, *site)[:3] if site else ()
    h = torch.einsum("...n,...nc->...c", (*given, *found)[0], after)
    return after, by_torch(h, *norm), *(found if given else found[1:])


def weighted(outputs):
    return sum((out * torch.linspace(-1, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs)


def close(one, other, tolerance):
    return one.shape == other.shape and bool(
        (one.double() - other.double()).norm() <= tolerance * (1e-12 + other.double().norm())
    )


# Every number of streams and every combination of dtypes is a library of its own, which takes
# seconds to build.
SIZES = [
    (4, "sinkhorn"),
    (4, "identity"),
    pytest.param(1, "sinkhorn", marks=pytest.mark.slow),
    (4, "permutations"),
    *(pytest.param(n, m, marks=pytest.mark.slow) for n in (2, 3, 5, 8) for m in ("sinkhorn", "identity")),
    *(pytest.param(n, "permutations", marks=pytest.mark.slow) for n in (1, 2, 3)),
    *(pytest.param(n, "kronecker", marks=pytest.mark.slow) for n in (1, 2, 4, 8)),
    *(pytest.param(n, "unconstrained", marks=pytest.mark.slow) for n in (1, 3, 4)),
    *(pytest.param(n, m, marks=pytest.mark.slow) for n in (3, 4) for m in (DEEPSEEK, "sinkhorn;last=columns", TURNED)),
]


@pytest.mark.parametrize(("n", "mapping"), SIZES)
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_composition_and_kernels_against_autograd(name, n, mapping, copies):
    tensors = [t.requires_grad_() for t in values(n, 5, (3, 2), mapping=mapping, copies=copies, name=name)]
    how = settings(name, mapping, 7)
    assert cpu.takes(torch.float64, n=n, mapping=mapping)
    for kernels, norm in itertools.product((fused, KERNELS), norms(5)):
        weights = [one.requires_grad_() for one in weights_of(norm)]
        want = by_reference(name, *tensors, *how, norm=norm)
        wanted = torch.autograd.grad(weighted(want), [*tensors, *weights])
        with torch.no_grad():
            out = getattr(kernels, name)(*tensors, *how, *norm)
        found = [out[i] for i in DIFFERENTIABLE[name]]
        assert all(close(one, other, 1e-12) for one, other in zip(found, want, strict=True))
        leaves = [t.clone().requires_grad_() for t in found]
        grads = torch.autograd.grad(weighted(leaves), leaves)
        with torch.no_grad():
            saved = (*(out[i] for i in SAVED[name]), *how, *of_backward(norm, out[-1]))
            *got, d_gain, d_shift = getattr(kernels, f"{name}_backward")(*grads, *tensors, *saved)
        got += [one for one in (d_gain, d_shift) if len(one)]
        assert all(close(one, other, 1e-11) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("copies", [False, True])
def test_gradcheck(copies):
    streams, branch, post, res, *site = (t.requires_grad_() for t in values(4, 2, (2,), copies=copies))

    def step(*tensors):
        after, h, _, next_post, next_res, *_ = mhc.step(*tensors, *HOW)
        return after, h, next_post, next_res

    def read(streams, *site):
        h, _, next_post, next_res, *_ = mhc.read(streams, *site, 4, *HOW)
        return h, next_post, next_res

    assert torch.autograd.gradcheck(step, (streams, branch, post, res, *site))
    assert torch.autograd.gradcheck(read, (streams, *site))
    assert torch.autograd.gradcheck(mhc.close, (streams, branch, post, res))
    assert torch.autograd.gradcheck(mhc.mix_read, (streams, branch, post, res, torch.rand_like(post).requires_grad_()))


@pytest.mark.parametrize(
    ("dtype", "copies"),
    [
        pytest.param(dtype, copies, marks=() if (dtype == torch.bfloat16) == copies else pytest.mark.slow)
        for dtype in (torch.float64, torch.bfloat16)
        for copies in (False, True)
    ]
    + [pytest.param(torch.float32, copies, marks=pytest.mark.slow) for copies in (False, True)],
)
def test_opcheck(dtype, copies):
    tensors = [t.requires_grad_() for t in values(dtype=dtype, copies=copies)]
    torch.library.opcheck(mhc.step.default, (*tensors, *HOW))
    for norm in norms(6, torch.float32)[1:]:
        torch.library.opcheck(mhc.step.default, (*tensors, *HOW, *norm))
    torch.library.opcheck(mhc.read.default, (tensors[0], *tensors[4:], 4, *HOW))
    torch.library.opcheck(mhc.close.default, tuple(tensors[:4]))
    for name in ("shifted_step", "mix_read"):
        tensors = [t.requires_grad_() for t in values(dtype=dtype, copies=copies, name=name)]
        torch.library.opcheck(getattr(mhc, name).default, (*tensors, *settings(name)))


@pytest.mark.parametrize("name", ["step", "shifted_step", "mix_read"])
def test_a_rounded_gradient_of_h_is_that_number(name):
    """In the compositions, as in the kernels: nothing is computed in its dtype."""
    given, how = values(dtype=torch.float32, name=name), settings(name)
    norm = ("rms", torch.rand(given[0].shape[-1]), None, 0.1)
    out, found = getattr(fused, name)(*given, *how, *norm), []
    saved, grad = [out[i] for i in SAVED[name]], torch.randn_like(out[1]).bfloat16()
    for one in (grad, grad.float()):
        grads = [one if i == 1 else None for i in DIFFERENTIABLE[name]]
        last = of_backward(norm, out[-1])
        found.append(getattr(fused, f"{name}_backward")(*grads, *given, *saved, *how, *last))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


TYPES = [
    (torch.float32, torch.float32, "sinkhorn"),
    (torch.float64, torch.float64, "sinkhorn"),
    (torch.bfloat16, torch.bfloat16, "sinkhorn"),
    (torch.float16, torch.float16, "sinkhorn"),
    pytest.param(torch.float32, torch.float32, "identity", marks=pytest.mark.slow),
    *(
        pytest.param(*types, "sinkhorn", marks=pytest.mark.slow)
        for half in (torch.bfloat16, torch.float16)
        for types in ((torch.float32, half), (half, torch.float32))
    ),
    *(
        pytest.param(d, d, m, marks=pytest.mark.slow)
        for d in (torch.float32, torch.bfloat16)
        for m in (*MAPPINGS, TURNED)
    ),
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize(("streams", "branch", "mapping"), TYPES)
def test_kernels_in_every_dtype_against_float64(streams, branch, mapping):
    """Tokens and features that are multiples of nothing, tails of tiles and of vectors, strides,
    gradients that nobody has, norms in turn.
    """
    assert cpu.takes(streams, branch, 4, mapping)
    turn = itertools.count()
    tolerance = TOLERANCES[streams]
    for tokens, width in SHAPES[: 3 if streams.itemsize == 2 else 4]:
        for copies in (False, True):
            for name in ("shifted_step", "mix_read", "step"):
                how = settings(name, mapping)
                given = [
                    t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t
                    for t in values(4, width, tokens, streams, mapping, copies, branch, name)
                ]
                exact = [t.double() for t in given]
                norm = norms(width)[next(turn) % 4]
                out = getattr(KERNELS, name)(*given, *how, *norm)
                for one, other in zip(out, getattr(fused, name)(*exact, *how, *norm), strict=True):
                    assert one.is_contiguous()
                    assert close(one, other, tolerance)
                saved = [out[i] for i in SAVED[name]]
                grads = [torch.randn_like(out[i]) for i in DIFFERENTIABLE[name]]
                for missing in (set(), {0}, {1}, {2, 3}, {0, 1, 2}):
                    some = [None if i in missing else g for i, g in enumerate(grads)]
                    wide = [None if g is None else g.double() for g in some]
                    last = (*how, *of_backward(norm, out[-1].double()))
                    got = getattr(KERNELS, f"{name}_backward")(*some, *given, *saved, *last)
                    want = getattr(fused, f"{name}_backward")(*wide, *exact, *(t.double() for t in saved), *last)
                    likes = (*given, *(norm[1:3] if norm else (None, None)))
                    for like, one, other in zip(likes, got, want, strict=True):
                        if like is None:
                            assert not len(one)
                            continue
                        assert one.dtype == like.dtype
                        sums = 10 if one.dim() == 1 else 1  # gradients of bias and scale: terms cancel
                        assert close(one, other, 3 * sums * max(tolerance, TOLERANCES[like.dtype]))
            for name, args in (("close", given[:4]), ("close_backward", [grads[1], *given[:4]])):
                got, want = getattr(KERNELS, name)(*args), getattr(fused, name)(*(t.double() for t in args))
                for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
                    assert close(one, other, max(tolerance, TOLERANCES[one.dtype]))
            if not copies:
                for name, args in (("update", given[:4]), ("update_backward", [grads[0], *given[:4]])):
                    got, want = getattr(KERNELS, name)(*args), getattr(reference, name)(*(t.double() for t in args))
                    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
                        assert close(one, other, max(tolerance, TOLERANCES[one.dtype]))


def test_kernels_run(monkeypatch):
    """Rounding would not tell: the composition must not be called at all."""

    def composition(*_):
        raise AssertionError("the composition runs where there is a kernel")

    assert cpu.takes(torch.float32)
    names = ("read", "step", "close", "shifted_step", "mix_read")
    for name in [f"{name}{direction}" for name in names for direction in ("", "_backward")]:
        monkeypatch.setattr(fused, name, composition)
    tensors = [t.requires_grad_() for t in values(dtype=torch.float32)]
    h, *_ = mhc.read(tensors[0], *tensors[4:], 4, *HOW)
    after, *_ = mhc.step(*tensors, *HOW)
    (h.sum() + after.sum() + mhc.close(*tensors[:4]).sum()).backward()
    assert all(t.grad.any() for t in tensors)
    for name in ("shifted_step", "mix_read"):
        tensors = [t.requires_grad_() for t in values(dtype=torch.float32, name=name)]
        sum(getattr(mhc, name)(*tensors, *settings(name))[i].sum() for i in DIFFERENTIABLE[name]).backward()
        assert all(t.grad.any() for t in tensors)


def test_without_a_compiler_the_composition_runs(monkeypatch):
    monkeypatch.setattr(cpu.kernels, "library", lambda *_, **__: None)
    monkeypatch.setattr(cpu.kernels, "_BUILT", {})
    assert not cpu.takes(torch.float32)
    tensors = [t.requires_grad_() for t in values(dtype=torch.float32)]
    after, h, *_ = mhc.step(*tensors, *HOW)
    got = torch.autograd.grad(weighted((after, h)), tensors)
    monkeypatch.undo()
    kernel = mhc.step(*tensors, *HOW)
    assert not torch.equal(kernel[1], h)  # another order of summation
    for one, other in zip(got, torch.autograd.grad(weighted(kernel[:2]), tensors), strict=True):
        assert close(one, other, 1e-4)


@pytest.mark.parametrize("width", [33, 64])
def test_a_layer_norm_far_from_zero_keeps_its_digits(width):
    """The variance is that around the mean, in the last features of a row as well."""
    streams, _, _, _, *site = values(width=width, tokens=(20,), dtype=torch.float32)
    streams = streams + 3000
    norm = ("layer", None, None, 1e-5)
    got = KERNELS.read(streams, *site, 4, *HOW, *norm)[0]
    h = KERNELS.read(streams, *site, 4, *HOW)[0]
    assert close(got, by_torch(h.double(), *norm), 1e-3)


def test_threads_do_not_change_the_result():
    for name in ("step", "shifted_step"):
        tensors = values(width=40, tokens=(1500,), dtype=torch.float32, name=name)
        norm = norms(40, torch.float32)[2]
        results, threads = [], torch.get_num_threads()
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            out = getattr(KERNELS, name)(*tensors, *HOW, *norm)
            saved, grads = ([out[i] for i in of[name]] for of in (SAVED, DIFFERENTIABLE))
            last = (*saved, *HOW, *of_backward(norm, out[-1]))
            back = getattr(KERNELS, f"{name}_backward")(*map(torch.ones_like, grads), *tensors, *last)
            results.append((*out, *back))
        torch.set_num_threads(threads)
        of_tokens = len(results[0]) - 5  # phi, bias, scale, gain and shift come last, sums over the threads
        assert all(torch.equal(one, other) for one, other in zip(results[1], results[2], strict=True))
        for one, other in zip(results[0][:of_tokens], results[1][:of_tokens], strict=True):
            assert torch.equal(one, other)
        assert all(close(one, other, 1e-5) for one, other in zip(results[0], results[1], strict=True))


@pytest.mark.parametrize("norm", [0, 2])
@pytest.mark.parametrize("name", ["step", "shifted_step"])
def test_nothing_but_the_old_streams_the_branch_and_coefficients_is_kept(name, norm):
    n, width, tokens = 4, 256, (100,)
    tensors = [t.requires_grad_() for t in values(n, width, tokens, torch.float32, name=name)]
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(mhc, name)(*tensors, *HOW, *norms(width, torch.float32)[norm])
    # post and res, and pre that came in; pre and post of the next site, z, inverse, moments
    small = n + n * n + (n if name == "shifted_step" else 0) + 2 * n + 24 + 1 + norm
    parameters = sum(t.numel() for t in tensors[-3:]) + norm * width
    assert sum(kept.values()) <= 100 * ((n + 1) * width + small) + parameters


def test_empty_batches():
    tensors = [t.requires_grad_() for t in values(tokens=(0, 3), dtype=torch.float32)]
    after, h, *_ = mhc.step(*tensors, *HOW)
    assert after.shape == (0, 3, 4, 6)
    (after.sum() + h.sum()).backward()
    assert not tensors[4].grad.any()


def test_nan_stays_nan():
    for dtype in (torch.float32, torch.bfloat16):
        streams, *rest = values(dtype=dtype)
        streams[0, 0, 0, 0] = float("nan")
        after, h, *_ = KERNELS.step(streams, *rest, *HOW)
        assert after[0, 0].isnan().any()
        assert h[0, 0].isnan().any()
        assert not after[1].isnan().any()


def test_decompositions_step_back_for_kernels_only():
    tensors = values(dtype=torch.float32)
    mixed = values(dtype=torch.float64, branch=torch.float32)
    assert fused_decompositions()[mhc.step.default](*tensors, *HOW) is NotImplemented
    assert len(fused_decompositions()[mhc.step.default](*mixed, *HOW)) == 8
    assert len(decompositions()[mhc.step.default](*tensors, *HOW)) == 8
    for name in ("shifted_step", "mix_read"):
        for dtype, kernel in ((torch.float32, True), (torch.float64, False)):
            tensors = values(dtype=dtype, name=name, branch=torch.float32)
            got = fused_decompositions()[getattr(mhc, name).default](*tensors, *settings(name))
            assert (got is NotImplemented) == kernel


def test_dtypes_without_a_kernel_take_the_composition(monkeypatch):
    called = []
    for name in ("step", "step_backward"):
        composition = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=composition, name=name: (called.append(name), f(*a))[1])
    tensors = [t.requires_grad_() for t in values(dtype=torch.float64, branch=torch.float32)]
    after, h, _, post, res, *_ = mhc.step(*tensors, *HOW)
    got = torch.autograd.grad(weighted([t.float() for t in (after, h, post, res)]), tensors)
    assert called == ["step", "step_backward"]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = by_reference("step", *exact, *HOW)
    for one, other in zip((after, h, post, res), want, strict=True):
        assert close(one, other, 1e-6)
    for like, one, other in zip(tensors, got, torch.autograd.grad(weighted(want), exact), strict=True):
        assert one.dtype == like.dtype
        assert close(one, other, 1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, y, p, r, *site: mhc.step(s, y[..., :2], p, r, *site, *HOW), r"mhc::step: .*got \[2, 3, 2\]"),
        (lambda s, y, p, r, *site: mhc.step(s[..., :3, :], y, p, r, *site, *HOW), r"mhc::step: .*n or 1"),
        (lambda s, y, p, r, *site: mhc.read(s, *site, 3, *HOW), r"mhc::read: streams must be .*\[..., 3 or 1, C\]"),
        (lambda s, y, p, r, *site: mhc.read(s, *site, 4, "mine", 20, 1e-6), "'mine' has no fused operator"),
        (lambda s, y, p, r, *site: mhc.read(s, site[0][:5], *site[1:], 4, *HOW), r"need phi \[24, 24\]"),
        (lambda s, y, p, r, *site: mhc.read(s, *site, 4, "sinkhorn", 0, 1e-6), "at least 1, got 0"),
        (lambda s, y, p, r, *site: mhc.close(s, y, p, r[..., :2]), r"mhc::close: .*got .*\[2, 3, 4, 2\]"),
        (lambda s, y, p, r, *site: mhc.mix_read(s, y, p, r, p[..., :2]), r"mhc::mix_read: post .*got \[2, 3, 2\]"),
        (
            lambda s, y, p, r, *site: mhc.shifted_step(s, y, p, r, p[0], *site, *HOW),
            r"mhc::shifted_step: .*got \[3, 4\]",
        ),
        (
            lambda s, y, p, r, phi, *site: mhc.shifted_step(s, y, p, r, p, phi[:, :0], *site, *HOW),
            r"mhc::shifted_step: .*need phi \[24, 24\]",
        ),
    ],
)
def test_wrong_shapes_are_named(call, words):
    with pytest.raises(ShapeError, match=words):
        call(*values())


def test_cuda_has_kernels_of_its_own_and_falls_back():
    from mhc_compile.ops.fused_library import on_cuda

    names = ("read", "step", "close", "shifted_step", "mix_read", "update")
    for name in (*(name for name in names if name != "update"), *(f"{name}_backward" for name in names)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mhc::{name}", "CUDA")
    tensors = values()  # float64, which no Triton kernel takes
    for one, other in zip(on_cuda("step")(*tensors, *HOW), fused.step(*tensors, *HOW), strict=True):
        assert torch.equal(one, other)
    tensors = values(name="mix_read")
    for one, other in zip(on_cuda("mix_read")(*tensors), fused.mix_read(*tensors), strict=True):
        assert torch.equal(one, other)


def test_kernels_are_built_while_the_caller_goes_on(monkeypatch):
    from mhc_compile.ops import prepare

    built = []
    monkeypatch.setattr(cpu.kernels, "library_of", lambda *what, lazy: built.append((*what, lazy)))
    for lazy in (False, True):
        cpu.prepare(torch.float32, torch.bfloat16, 4, "sinkhorn", lazy=lazy).join()
    assert built == [(torch.float32, torch.bfloat16, 4, "sinkhorn", lazy) for lazy in (False, True)]
    assert cpu.prepare(torch.float64, torch.float32, 4, "sinkhorn") is None
    prepare(torch.empty(1, device="meta"), torch.empty(1, device="meta"), 4, 32, "sinkhorn", lazy=True)
    assert len(built) == 2
