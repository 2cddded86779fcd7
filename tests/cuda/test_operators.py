"""The fused operators against the equations in float64, forward and backward.

A test compiles one specialisation (n, m, dtype, convention) and loops over shapes that share it.
"""

from __future__ import annotations

import pytest
import torch
from helpers import lazy_oracle
from helpers.gpu import CHOSEN, needs_device
from helpers.norms import norms, of_backward
from helpers.site_oracle import EPS, NORMED, OPERATORS, TOLERANCES, Case, assert_close, error, errors

from mhc_compile.config.presets import PRESETS
from mhc_compile.mappings import columns as columns_of
from mhc_compile.ops import is_fused, lazy_reference
from mhc_compile.ops.lazy_reference import LONGEST

pytestmark = needs_device()
mhc = torch.ops.mhc
#: No product of a block size of tokens or of channels, so that all are one specialisation. The
#: interpreter takes seconds for one of them.
SLOW = CHOSEN == "interpreter"
TOKENS, WIDTH = (67,) if SLOW else (0, 17, 67, 200), 70
#: Conventions in which every setting differs from the paper's, and those of the presets.
TURNED = (
    "sinkhorn;pre_eps=0.02;post_range=3.0;post_eps=0.1;sinkhorn_eps=0.01;last=columns;gate_speed=1.5;scale_speed=0.75"
)
SPECS = {str(preset.convention): preset.iterations for preset in PRESETS.values() if not preset.convention.rank}
SPECS |= {TURNED: 5, "sinkhorn;last=columns": 20, "permutations": 1, "kronecker": 1, "unconstrained": 1}
#: Numbers of streams of every mapping, without the 4 of `SPECS`.
COUNTS = {"identity": (1, 2, 3, 8), "permutations": (1, 2, 3), "kronecker": (1, 2, 8), "unconstrained": (1, 2, 3, 8)}
LAZY = [torch.float32, torch.bfloat16, *([] if SLOW else [torch.float16])]
HELD = [(n, m) for n in (1, 2, 3, 4, 8) for m in sorted({1, n})]


@pytest.fixture(autouse=SLOW)
def rounded(monkeypatch):
    """Triton's interpreter cuts off bfloat16 numbers: a bias of 1/500, where a GPU has none."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture
def compare(device, record_property):
    def run(names, *sizes, used=None, **settings):
        for name in names:
            case = Case(device, *sizes, **settings)
            if name == "update" and case.tensors["streams"].shape[-2] != case.n:
                continue  # it takes no equal streams
            dtype = str(case.dtype).removeprefix("torch.")
            found = errors(case, name, used)
            for one in found:
                record_property("error", (f"{dtype} streams, {name}, {one.kind}", one.found))
            assert_close(found)

    return run


@pytest.mark.parametrize(("n", "m"), HELD)
def test_every_number_of_streams(compare, n, m):
    for tokens in TOKENS:
        compare(("step", "shifted_step", "close") if SLOW and n == 8 else OPERATORS, n, m, tokens, WIDTH)


@pytest.mark.parametrize(("n", "spec"), [(4, spec) for spec in SPECS] + [(n, s) for s in COUNTS for n in COUNTS[s]])
def test_every_convention(compare, n, spec):
    for tokens in TOKENS[-3:]:
        compare(("read", "step", "shifted_step"), n, n, tokens, WIDTH, spec, iterations=SPECS.get(spec, 1))


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "branch"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_every_dtype(compare, dtype, branch, m):
    for tokens in TOKENS:
        compare(OPERATORS, 4, m, tokens, WIDTH, dtype=dtype, branch=branch)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "sinkhorn"])
def test_every_convention_in_bfloat16(compare, spec):
    for tokens in (67,) if SLOW else (17, 200):
        compare(("step", "shifted_step"), 4, 4, tokens, WIDTH, spec, torch.bfloat16, iterations=SPECS[spec])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48] if SLOW else [640, 1000])
def test_many_tokens_and_one(compare, dtype, width):
    """Sizes that are multiples of 16, for which Triton compiles other code, and a single token."""
    n = 2 if SLOW else 4
    for tokens in (0, 1, (2, 300)) if SLOW else (1, (2, 2048)):
        compare(OPERATORS, n, n, tokens, width, dtype=dtype)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *([] if SLOW else [torch.float16])])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms(compare, norm, dtype, m):
    for tokens in TOKENS:
        compare(NORMED, 4, m, tokens, 2 * WIDTH, dtype=dtype, norm=norm, iterations=2)


@pytest.mark.parametrize(
    "sizes", [(2, 1, 0, 48), (2, 2, (2, 19), 8), (3, 3, 1, 80), *([] if SLOW else [(8, 8, 300, 640)])]
)
@pytest.mark.parametrize(("norm", "vectors"), [("rms", "gain"), ("layer", "shift"), ("layer", "")])
def test_norms_with_and_without_gain_and_shift(compare, sizes, norm, vectors):
    compare(NORMED, *sizes, norm=norm, vectors=vectors, iterations=2)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_absent_gradients_with_a_norm(compare, which):
    for name in NORMED:
        compare((name,), 2, 2, 17, WIDTH, used=(OPERATORS[name][1][which],), norm="layer", iterations=2)


def test_layer_norm_far_from_zero(device):
    """The variance keeps its digits where the mean is large."""
    case = Case(device, 2, 2, 17, 2 * WIDTH, norm="layer", vectors="")
    case.tensors["streams"] += 300
    for name, place in NORMED.items():
        want = case.by_equations(name, [tensor.double() for tensor in case.of(name)])[place]
        torch.testing.assert_close(case.call(name, case.of(name))[place].double(), want, rtol=0, atol=1e-3)


def lazy_case(device, sites, dtype, tokens, held):
    """The tensors of a lazy step on the device and in float64, and gradients of its results."""
    torch.manual_seed(sites)
    given = lazy_oracle.values(sites, WIDTH, tokens, copies=held == 1, dtype=dtype)
    place = torch.utils._pytree.tree_map(lambda tensor: tensor.to(device), given)
    exact = torch.utils._pytree.tree_map(torch.Tensor.double, given)
    grads = lazy_oracle.incoming(WIDTH, tokens)
    near = [grad.to(device, dtype if i < 2 else torch.float32) for i, grad in enumerate(grads)]
    return place, exact, near, [grad.cpu().double() for grad in near]


@pytest.mark.parametrize("held", [1, lazy_oracle.N])
@pytest.mark.parametrize("dtype", LAZY)
@pytest.mark.parametrize("sites", range(1, LONGEST["cuda"] + 1))
def test_lazy_steps(device, record_property, sites, dtype, held):
    """The old streams are not in memory. Cases differ in the norm, and in what has no gradient."""
    how, limits = lazy_oracle.HOW, TOLERANCES[dtype]
    number = (sites + LAZY.index(dtype) + (held == 1)) % 4
    norm = norms(WIDTH)[number]
    tensors, exact, grads, exact_grads = lazy_case(device, sites, dtype, (67,) if SLOW else (2, 257), held)
    if sites == 3:
        grads[number] = exact_grads[number] = None
    near = tuple(one.to(device, torch.float32) if isinstance(one, torch.Tensor) else one for one in norm)
    wide = tuple(one.float().double() if isinstance(one, torch.Tensor) else one for one in norm)
    (after, *rest), wanted = lazy_oracle.oracle(exact, exact_grads, wide)
    for write in (False, True):
        streams, h, pre, *coefficients, moments = mhc.lazy_step(*tensors, write, *how, *near)
        pairs = [(h, rest[0]), *zip(coefficients[:2], rest[1:], strict=True)]
        pairs += [(streams, after)] if write else []
        assert write or streams.shape == (0,)
    if sites > 1:
        saved = pre, *(coefficients[i] for i in (0, 2, 3)), *how, *of_backward(near, moments)
        got = [one for one in mhc.lazy_step_backward(*grads, *tensors, *saved) if one.numel()]
        pairs += zip(got, wanted, strict=True)
    for place, (one, other) in enumerate(pairs):
        limit = 10 * limits[1] if one.dim() == 1 else limits[int(one.dtype == torch.float32)]
        found = error(one.detach().cpu(), other.detach())
        record_property("error", (f"{str(dtype)[6:]} streams, lazy_step", found))
        assert found <= limit, (place, list(one.shape), norm[:1], found)


@pytest.mark.parametrize(("n", "spec"), [(1, "sinkhorn"), (2, "permutations"), (3, "identity"), (4, TURNED)])
def test_lazy_steps_of_other_conventions(device, n, spec):
    """Against the compositions, which share nothing with the kernels."""
    columns = columns_of(spec.split(";")[0], n)
    for held in sorted({1, n}):
        torch.manual_seed(n + held)
        shapes = (held, WIDTH), *((WIDTH,), (n,), (n, n)) * 3
        streams, *lists = (torch.randn(67, *shape, device=device) for shape in shapes)
        lists = lists[::3], lists[1::3], lists[2::3]
        site = torch.randn(n * WIDTH, columns) / n / 8, torch.randn(columns), torch.rand(3)
        tensors = streams, *lists, *(one.to(device) for one in site)
        how, grads = (
            (spec, 3, EPS),
            [torch.randn(67, *shape, device=device) for shape in ((n, WIDTH), (WIDTH,), (n,), (n, n))],
        )
        step, want = mhc.lazy_step(*tensors, True, *how), lazy_reference.lazy_step(*tensors, True, *how)
        saved = (*(step[i] for i in (2, 3, 5, 6)), *how)
        got = mhc.lazy_step_backward(*grads, *tensors, *saved)
        for one, other in zip(
            (*step, *got), (*want, *lazy_reference.lazy_step_backward(*grads, *tensors, *saved)), strict=True
        ):
            assert error(one, other.double()) <= 1e-4


@pytest.mark.parametrize("name", [*NORMED, "lazy_step"])
def test_h_in_another_dtype(device, name):
    """It is h, rounded; and a rounded gradient of it is that number."""
    case = Case(device, 4, 4, 17, WIDTH, norm="rms", vectors="gain", iterations=2)
    tensors = case.of(name) if name in NORMED else [case.tensors[key] for key in case.keys("step")]
    if name == "lazy_step":
        tensors[1:4] = ([one] * 2 for one in tensors[1:4])
    tensors, place = tensors[:-1], NORMED.get(name, 1)
    settings = case.settings(name) if name in NORMED else (True, *case.settings("step"))
    norm = ("rms", case.tensors["gain"], None, EPS)
    forward, backward = getattr(mhc, name), getattr(mhc, f"{name}_backward")
    wide, half = forward(*tensors, *settings, *norm), forward(*tensors, *settings, *norm, torch.bfloat16)
    assert half[place].dtype == torch.bfloat16
    assert torch.equal(half[place], wide[place].bfloat16())
    grad = torch.randn(half[place].shape, generator=torch.Generator().manual_seed(1)).to(device).bfloat16()
    count = {"read": 3, "mix_read": 2, "shifted_step": 5}.get(name, 4)
    at = {"read": (1, 2, 4, 5), "mix_read": ()}.get(name, (2, 3, 5, 6))
    saved = (*(wide[i] for i in at), *settings[name in ("read", "lazy_step") :], *norm[:3], wide[-1])
    found = []
    for one in (grad, grad.float()):
        grads = [None] * count
        grads[place] = one
        found.append(backward(*grads, *tensors, *saved))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("iterations", [1, 2])
def test_few_iterations(compare, iterations):
    compare(("read", "step"), 4, 4, 17, WIDTH, iterations=iterations)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), (3, 4)])
def test_absent_gradients_are_zero(compare, used):
    compare(("step", "shifted_step"), 4, 4, 17, WIDTH, used=used)
    if len(used) == 1:
        compare(("mix_read",), 4, 4, 17, WIDTH, used=used)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device, name):
    case = Case(device, 4, 4, 17, WIDTH)
    tensors = [tensor.requires_grad_() for tensor in case.of(name)]
    torch.library.opcheck(getattr(mhc, name).default, (*tensors, *case.settings(name)))


def test_strides_do_not_matter(device):
    case = Case(device, 4, 4, 17, WIDTH)
    for name in OPERATORS:
        turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in case.of(name)]
        for a, b in zip(case.call(name, case.of(name)), case.call(name, turned), strict=True):
            assert torch.equal(a, b), name


def test_wild_logits_stay_finite(device):
    case = Case(device, 4, 4, 17, WIDTH)
    case.tensors["bias"] *= 100
    case.tensors["scale"] *= 40
    for name in ("read", "step", "shifted_step"):
        inputs = [tensor.clone().requires_grad_() for tensor in case.of(name)]
        got = case.call(name, inputs)
        res = got[OPERATORS[name][1][-1]]
        assert torch.allclose(res.sum(-1), torch.ones_like(res[..., 0]), atol=1e-5)
        assert all(
            g.isfinite().all() for g in torch.autograd.grad(sum(got[i].sum() for i in OPERATORS[name][1]), inputs)
        )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(device, dtype, strict):
    if SLOW:
        pytest.skip("the interpreter runs one program after the other")
    case = Case(device, 4, 4, 200, WIDTH, dtype=dtype)

    def run(name):
        inputs = [tensor.clone().requires_grad_() for tensor in case.of(name)]
        got = case.call(name, inputs)
        return (
            *got,
            *torch.autograd.grad([got[i] for i in OPERATORS[name][1]], inputs, [got[i] for i in OPERATORS[name][1]]),
        )

    torch.use_deterministic_algorithms(strict)
    try:
        for name in OPERATORS:
            for a, b in zip(run(name), run(name), strict=True):
                assert torch.equal(a, b), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_gated_read_of_qwen4(device, record_property):
    """`mhc::gated_read` is a composition; its equations once more, in float64 on CPU."""
    assert not is_fused(str(PRESETS["qwen4-exp"].convention))
    n, width, rank = 4, WIDTH, 3
    X, phi, norm, up = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate([(17, n, width), (n * width, rank + n), (n * width,), (rank, n * width)])
    )
    exact = [tensor.double().requires_grad_() for tensor in (X, phi, norm, up)]
    x = exact[0] / torch.sqrt(exact[0].square().mean(-1, keepdim=True) + EPS)
    x = x * (1 + exact[2].unflatten(0, (n, width)))
    down = x.flatten(-2) @ exact[1] / n
    silu = down[:, :rank] * torch.sigmoid(down[:, :rank])
    want = ((torch.sigmoid(silu @ exact[3]).unflatten(-1, (n, width)) * x).mean(-2), 2 * torch.sigmoid(down[:, rank:]))
    inputs = [tensor.to(device).requires_grad_() for tensor in (X, phi, norm, up)]
    got = mhc.gated_read(*inputs, EPS)[:2]
    wanted = torch.autograd.grad([w.sum() for w in want], exact)
    grads = torch.autograd.grad([g.sum() for g in got], inputs)
    for a, b in zip((*got, *grads), (*want, *wanted), strict=True):
        number = float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm())
        record_property("error", ("float32 gated_read", number))
        assert number < 1e-5


def test_more_elements_than_31_bits(cuda):
    """Offsets of tokens are 64 bits wide: the last tokens are as right as alone."""
    n, width = 4, 2560
    tokens = 2**31 // (n * width) + 64
    case = Case(cuda, n, n, 64, width, dtype=torch.bfloat16)
    many = [
        tensor.repeat(tokens // 64 + 1, *(1 for _ in tensor.shape[1:]))[-tokens:] if tensor.shape[0] == 64 else tensor
        for tensor in (tensor.detach() for tensor in case.of("step"))
    ]
    for a, b in zip(case.call("step", many), case.call("step", case.of("step")), strict=True):
        torch.testing.assert_close(a[-64:], b, rtol=1e-2, atol=1e-3)


def test_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with torch.cuda.device(0):
        for name in OPERATORS:
            assert_close(errors(Case("cuda:1", 4, 4, 17, WIDTH), name))
