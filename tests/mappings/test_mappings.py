"""Residual mappings: what they promise about their matrices, their gradients, and a model that
starts with them.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from helpers.builders import Decoder, distance, tokens, twin
from helpers.gates import scatter

import mhc_compile
import mhc_compile.errors
from mhc_compile import HyperConnection, Options
from mhc_compile.errors import OptionError
from mhc_compile.inspection.cost import site_cost
from mhc_compile.mappings import MAPPINGS, ResidualMapping, columns, get_mapping
from mhc_compile.mappings.permutations import permutations
from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.check import check

mhc = torch.ops.mhc
NEW = ["permutations", "kronecker", "unconstrained"]
SIZES = [(name, n) for name in ("sinkhorn", "identity", *NEW) for n in (1, 2, 3, 4, 8) if columns(name, n)]
#: Sizes at which operators run: each is a library of its own, which takes seconds to build.
BUILT = [
    pytest.param(name, n, marks=() if (name, n) in {("permutations", 4), ("kronecker", 4)} else pytest.mark.slow)
    for name, n in SIZES
]
EXACT = [(name, n) for name, n in SIZES if name in ("identity", "permutations", "kronecker")]


def logits_of(name, n, dtype=torch.float64, size=2.0):
    return size * torch.randn(5, 3, get_mapping(name).logits(n), dtype=dtype)


# Matrices


@pytest.mark.parametrize(("name", "n"), EXACT)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_rows_and_columns_sum_to_one_to_rounding(name, n, dtype, error):
    matrix = get_mapping(name).matrix(logits_of(name, n, dtype, 3.0), n, 20)
    assert matrix.shape == (5, 3, n, n)
    assert matrix.dtype == dtype
    assert (matrix >= 0).all()
    assert (matrix.sum(-1) - 1).abs().max() <= error
    assert (matrix.sum(-2) - 1).abs().max() <= error


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_permutations_are_all_of_them_in_lexicographic_order(n):
    assert permutations(n).tolist() == [list(each) for each in itertools.permutations(range(n))]
    vertices = get_mapping("permutations").matrix(torch.eye(len(permutations(n)), dtype=torch.float64) * 1e3, n, 20)
    assert torch.equal(vertices.argmax(-1), permutations(n))
    assert torch.equal(vertices.sort(-1).values[..., -1], torch.ones(len(vertices), n, dtype=torch.float64))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_kronecker_is_the_product_of_its_factors_with_the_first_one_outside(factors):
    logits = torch.randn(2 * factors, dtype=torch.float64)
    want = torch.ones(1, 1, dtype=torch.float64)
    for p, q in logits.unflatten(-1, (-1, 2)).softmax(-1).tolist():
        want = torch.kron(want, torch.tensor([[p, q], [q, p]], dtype=torch.float64))
    assert torch.allclose(get_mapping("kronecker").matrix(logits, 2**factors, 20), want, rtol=0, atol=1e-15)


def test_unconstrained_is_whatever_the_logits_are():
    logits = logits_of("unconstrained", 3)
    assert torch.equal(get_mapping("unconstrained").matrix(logits, 3, 20), logits.unflatten(-1, (3, 3)))
    assert [name for name, mapping in MAPPINGS.items() if not mapping.doubly_stochastic] == ["unconstrained"]


# Gradients


@pytest.mark.parametrize(
    ("name", "n"),
    [pytest.param(*size, marks=pytest.mark.slow if size[0] == "sinkhorn" and size[1] != 4 else ()) for size in SIZES],
)
def test_backward_is_that_of_autograd_and_of_the_default(name, n):
    mapping, logits = get_mapping(name), logits_of(name, n).requires_grad_()
    grad = torch.randn(5, 3, n, n, dtype=torch.float64)
    matrix = mapping.matrix(logits, n, 5)
    want = torch.autograd.grad(matrix, logits, grad)[0] if matrix.requires_grad else torch.zeros_like(logits)
    for backward in (mapping.backward, lambda *args: ResidualMapping.backward(mapping, *args)):
        got = backward(grad, logits.detach(), n, 5)
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "n"), [size for size in SIZES if size[0] in NEW])
@pytest.mark.parametrize("size", [1e2, 1e10, 1e38])
def test_nothing_becomes_inf_or_nan_at_huge_logits(name, n, size):
    mapping, logits = get_mapping(name), logits_of(name, n, torch.float32, size).clamp(-3e38, 3e38)
    matrix = mapping.matrix(logits, n, 20)
    grad = mapping.backward(torch.randn_like(matrix), logits, n, 20)
    assert matrix.isfinite().all()
    assert grad.isfinite().all()
    if mapping.doubly_stochastic:
        assert (matrix.sum(-1) - 1).abs().max() < 1e-6


# Starts


@pytest.mark.parametrize(
    ("name", "n"),
    [
        pytest.param(*size, marks=pytest.mark.slow if size[0] == "sinkhorn" and size[1] != 4 else ())
        for size in SIZES
        if size[1] > 1
    ],
)
def test_the_start_is_near_the_identity_and_alive(name, n):
    mapping = get_mapping(name)
    start = mapping.init_preserve(n).double()
    matrix = mapping.matrix(start, n, 20)
    assert start.shape == (mapping.logits(n),)
    assert (matrix.sum(-1) - 1).abs().max() < 1e-6
    assert matrix.diagonal().min() > 0.85
    # Entries of one size give every logit a gradient that counts.
    grad = mapping.backward(torch.randn(n, n, dtype=torch.float64), start, n, 20)
    assert (grad.abs() > 1e-5).all()
    if name in NEW[:2]:
        assert matrix.diagonal().max() == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(("name", "n"), [size for size in BUILT if size.values[0] in NEW])
def test_one_site_starts_as_the_residual_add(name, n):
    connection = HyperConnection(6, Options(streams=n, mapping=name), index=1)
    x = torch.randn(2, 3, 6)
    streams = connection(x.unsqueeze(-2).expand(-1, -1, n, -1), torch.tanh)
    assert (streams - (x + x.tanh()).unsqueeze(-2)).abs().max() < 2e-6
    trained = connection.coefficients(torch.randn(2, 3, n, 6))[2].square().sum()
    if connection.phi.shape[1] > 2 * n and n > 1:
        (gradient,) = torch.autograd.grad(trained, connection.bias)
        assert (gradient[2 * n :] != 0).any()


def test_from_scratch_they_mix_evenly_and_unconstrained_keeps_its_streams():
    for name in NEW:
        connection = HyperConnection(64, Options(mapping=name, init="random", init_gain=1e-3))
        res = connection.coefficients(torch.randn(3, 4, 64))[2]
        want = torch.eye(4) if name == "unconstrained" else torch.full((4, 4), 0.25)
        assert (res - want).abs().max() < 0.02


# Models


@pytest.mark.parametrize(
    ("name", "inner_backend"),
    [
        ("permutations", "aot_eager"),
        ("kronecker", "eager"),
        ("unconstrained", "eager"),
        *(
            pytest.param(name, inner_backend, marks=pytest.mark.slow)
            for name in NEW
            for inner_backend in ("aot_eager", "inductor")
        ),
    ],
)
def test_a_model_keeps_its_function_and_its_gradients_and_learns(name, inner_backend):
    torch.manual_seed(0)
    plain = Decoder()
    model = twin(plain)
    compiled = torch.compile(model, backend="mhc", options={"mapping": name, "inner_backend": inner_backend})
    want, got = plain(tokens()), compiled(tokens())
    assert distance(got, want) < 1e-5
    want.square().sum().backward()
    got.square().sum().backward()
    ours = dict(model.named_parameters())
    for path, parameter in plain.named_parameters():
        assert distance(ours[path].grad, parameter.grad, 1e-6) < 1e-5, path
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    connection = next(iter(mhc_compile.connections(model).values()))
    before = connection.bias.detach().clone()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        compiled(tokens()).square().sum().backward()
    assert (connection.bias != before)[8:].any()  # H_res moves, from the second step on
    assert mhc_compile.connections(model)["blocks.0.mhc.attn"].phi.shape == (4 * 8, columns(name, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", [NEW[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NEW[1:])])
def test_gradients_of_a_whole_model_are_exact(name):
    """Finite differences in float64, away from the start: no symmetry hides a wrong term."""
    torch.manual_seed(0)
    model = Decoder(width=4, layers=1).double()
    mhc_compile.attach(model, tokens(1, 3), options={"mapping": name, "streams": 2})
    compiled = torch.compile(model, backend="mhc", options={"mapping": name, "streams": 2, "inner_backend": "eager"})
    scatter(model, 0.3, add=True)
    loss = compiled(tokens(1, 3)).square().sum()
    loss.backward()
    connection = mhc_compile.connections(model)["blocks.0.mhc.attn"]
    for parameter in connection.parameters():
        for at in range(0, parameter.numel(), 3):
            value, step, losses = parameter.data.view(-1)[at].item(), 1e-5, []
            for sign in (1, -1):
                parameter.data.view(-1)[at] = value + sign * step
                with torch.no_grad():
                    losses.append(compiled(tokens(1, 3)).square().sum().item())
            parameter.data.view(-1)[at] = value
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert parameter.grad.view(-1)[at].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7)


CASES = [("pre-norm", "permutations")]
MORE = [(family, name) for family in ("post-norm", "parallel", "swin", "resnet") for name in NEW]


@pytest.mark.parametrize(("family", "name"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_models_of_the_zoo_are_preserved(family, name):
    outcome = check(zoo.get(family), options={"mapping": name, "inner_backend": "aot_eager"})
    assert outcome.status == "ok", outcome.message
    assert max(outcome.error_forward, outcome.error_gradients) <= 1e-5


# What else depends on the mapping


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mapping": "permutations", "streams": 5}, r"'permutations' has no matrices for 5 streams, only for 1 to 4"),
        ({"mapping": "kronecker", "streams": 3}, r"'kronecker' has no matrices for 3 streams, only for 1, 2, 4 and 8"),
        ({"mapping": "permutation"}, r"'permutation'; did you mean 'permutations'\?"),
        ({"mapping": "kroneker"}, r"'kroneker'; did you mean 'kronecker'\?"),
    ],
)
def test_unknown_mapping_is_rejected(options, words):
    with pytest.raises(OptionError, match=words):
        Options.parse(options)


def test_operators_reject_numbers_of_streams_that_the_mapping_does_not_have():
    with pytest.raises(OptionError, match="no matrices for 5 streams"):
        mhc.coefficients(
            torch.zeros(2, 5, 3), torch.zeros(15, 12), torch.zeros(12), torch.zeros(3), "permutations", 20, 1e-6
        )


def test_costs_are_those_of_the_mapping():
    with_sinkhorn, without = (
        site_cost(64, 4, Options(mapping=name).resolved) for name in ("sinkhorn", "unconstrained")
    )
    assert with_sinkhorn.flops - without.flops == 4 * 16 * 20
    assert site_cost(64, 4, Options(mapping="kronecker").resolved).parameters == 4 * 64 * 12 + 12 + 3


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_checkpoints_are_restored_with_their_mapping(name, n, tmp_path):
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens(), options={"mapping": name, "streams": n})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for checkpoint in (model.state_dict(), tmp_path / "model.pt"):
        restored = mhc_compile.restore(Decoder(layers=1), checkpoint)
        assert {(connection.mapping, connection.streams) for connection in restored.values()} == {(name, n)}
    with (
        nullcontext()
        if name == "unconstrained"
        else pytest.raises(mhc_compile.errors.AttachError, match="does not fit")
    ):
        mhc_compile.restore(Decoder(layers=1), model.state_dict(), options={"mapping": "sinkhorn"})


def test_of_files_that_keep_shapes_only_the_likeliest_mapping_is_taken():
    for name, n, taken in (
        ("kronecker", 4, "kronecker"),
        ("permutations", 4, "permutations"),
        ("unconstrained", 4, "sinkhorn"),
    ):
        model = Decoder(layers=1)
        mhc_compile.attach(model, tokens(), options={"mapping": name, "streams": n})
        restored = mhc_compile.restore(Decoder(layers=1), dict(model.state_dict()))
        assert {connection.mapping for connection in restored.values()} == {taken}
