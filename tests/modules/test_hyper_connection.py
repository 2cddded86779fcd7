"""`HyperConnection` by hand: parameters, starts, and the state that each start is in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mhc_compile import HyperConnection, Options
from mhc_compile.errors import OptionError, ShapeError

WIDTH = 10


# Every number of streams is a library of its own, which takes seconds to build.
@pytest.mark.parametrize("n", [2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5, 6, 7, 8))])
@pytest.mark.parametrize("mapping", ["sinkhorn", "identity"])
def test_default_start_is_the_residual_add_for_equal_streams(n, mapping):
    connection = HyperConnection(WIDTH, Options(streams=n, mapping=mapping), index=5)
    x = torch.randn(3, 7, WIDTH)
    branch = nn.Linear(WIDTH, WIDTH)
    streams = connection(x.unsqueeze(-2).expand(-1, -1, n, -1), branch)
    assert streams.shape == (3, 7, n, WIDTH)
    want = x + branch(x)
    assert (streams - want.unsqueeze(-2)).abs().max() < 2e-6
    pre, post, res = connection.coefficients(streams)
    assert torch.allclose(pre.sum(-1), torch.ones(3, 7), atol=1e-6)
    assert torch.equal(post, torch.ones(3, 7, n))
    assert torch.allclose(res.sum(-1), torch.ones(3, 7, n), atol=1e-6)


def test_the_lean_rotates_with_the_index():
    leaders = []
    for index in range(6):
        connection = HyperConnection(WIDTH, Options(), index=index)
        pre, _, res = connection.coefficients(torch.randn(1, 4, WIDTH))
        leaders.append(pre.argmax().item())
        assert pre.max().item() == pytest.approx(0.7, abs=1e-6)
        assert 0.9 < res.diagonal(dim1=-2, dim2=-1).min() < 0.99  # lean, but alive
    assert leaders == [0, 1, 2, 3, 0, 1]


def test_default_start_is_alive():
    """phi = 0 with scale > 0 receives a gradient; H_res receives one as soon as the streams
    differ.
    """
    connection = HyperConnection(WIDTH, Options())
    connection(torch.randn(2, 3, 4, WIDTH), torch.tanh).square().sum().backward()
    for name, parameter in connection.named_parameters():
        gradient = parameter.grad
        if name == "scale":
            assert not gradient.any()  # z = 0
        else:
            assert (gradient.abs() > 0).all(), name


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({}, 0.01),
        ({"mapping": "unconstrained", "read_out": "learned"}, 0.01),
        ({"preset": "liger"}, 0.01),
        ({"init": "random"}, 0.01),
        ({"init_gain": 0.5, "preset": "glm5-next"}, 0.5),
    ],
)
def test_the_initial_gain(options, gain):
    connection = HyperConnection(16, Options(**options), last=True)
    assert (connection.scale_speed * connection.scale).tolist() == pytest.approx([gain] * 3)
    if connection.read_out is not None:
        assert connection.read_out.scale.tolist() == pytest.approx([gain])


@pytest.mark.parametrize("width", [128, 1024])
def test_a_step_moves_logits_by_the_gain_through_phi(width):
    """AdamW at lr moves the logit of pre by 0.8 a nC lr, for a token that pulls it up."""
    connection, lr = HyperConnection(width), 1e-3
    connection.bias.requires_grad_(False)
    streams = torch.randn(1, 1, 4, width)
    optimizer = torch.optim.AdamW(connection.parameters(), lr=lr, weight_decay=0.0)
    before = connection.coefficients(streams)[0].logit()
    (-connection.coefficients(streams)[0].logit().sum()).backward()
    connection.scale.grad = None
    optimizer.step()
    moved = connection.coefficients(streams)[0].logit() - before
    assert (moved / (0.8 * 0.01 * 4 * width * lr)).tolist()[0][0] == pytest.approx([1.0] * 4, rel=0.1)


@pytest.mark.parametrize("speed", [1.0, 8.0])
def test_a_step_moves_logits_by_the_speed_through_bias(speed):
    connection, lr = HyperConnection(16, Options(gate_speed=speed)), 1e-3
    connection.phi.requires_grad_(False)
    connection.scale.requires_grad_(False)
    streams = torch.randn(1, 1, 4, 16)
    optimizer = torch.optim.AdamW([connection.bias], lr=lr, weight_decay=0.0)
    before = connection.coefficients(streams)[0].logit()
    (-connection.coefficients(streams)[0].logit().sum()).backward()
    optimizer.step()
    moved = connection.coefficients(streams)[0].logit() - before
    assert (moved / (speed * lr)).tolist()[0][0] == pytest.approx([1.0] * 4, rel=1e-3)


def test_a_step_moves_the_scale_by_the_learning_rate_in_units_of_about_its_start():
    connection, lr = HyperConnection(16), 1e-3
    with torch.no_grad():
        connection.phi.normal_()
    optimizer = torch.optim.AdamW([connection.scale], lr=lr, weight_decay=0.0)
    before = connection.scale.clone()
    sum(one.sum() for one in connection.coefficients(torch.randn(5, 4, 16))[:2]).backward()
    optimizer.step()
    assert ((connection.scale - before).abs() / lr).tolist()[:2] == pytest.approx([1.0, 1.0], rel=1e-3)
    assert before.tolist() == pytest.approx([1.28] * 3)


def test_the_speed_changes_no_gradient():
    """So that a global norm, by which gradients are clipped, is that of the paper's parameters."""
    found = []
    for speed in (1.0, 8.0):
        torch.manual_seed(0)
        connection = HyperConnection(16, Options(gate_speed=speed, scale_speed=1.0))
        with torch.no_grad():
            connection.phi.normal_()
            connection.bias.copy_(torch.randn(24) / speed)
            connection.scale.copy_(torch.rand(3))
        coefficients = connection.coefficients(torch.randn(5, 4, 16))
        sum((one * torch.randn_like(one)).sum() for one in coefficients).backward()
        found.append([p.grad for p in connection.parameters()])
    torch.testing.assert_close(*found)
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


def test_a_module_that_an_earlier_version_pickled_has_speed_1():
    connection = HyperConnection(16, Options(gate_speed=1.0, scale_speed=1.0))
    for name in ("gate_speed", "scale_speed", "function"):
        del connection.__dict__[name]
    again = copy.deepcopy(connection)
    assert (again.speeds, bool(again.function)) == ({"bias": 1.0, "scale": 1.0}, True)
    metadata = again.state_dict()._metadata[""]
    assert (metadata["gate_speed"], metadata["scale_speed"]) == (1.0, 1.0)


def test_scratch_start():
    connection = HyperConnection(WIDTH, Options(init="random"))
    streams = torch.randn(50, 4, WIDTH)
    pre, post, res = connection.coefficients(streams)
    assert (pre - 0.5).abs().max() < 0.05
    assert (post - 1).abs().max() < 0.05
    assert (res - 0.25).abs().max() < 0.05
    _, _, _, z = torch.ops.mhc.coefficients(
        streams, connection.phi, connection.bias, connection.scale, "sinkhorn", 20, 1e-6
    )
    assert z.std().item() == pytest.approx(1.0, abs=0.15)


def test_parameter_counts_follow_the_paper():
    connection = HyperConnection(4096, Options(), device="meta")
    assert sum(p.numel() for p in connection.parameters()) == 4 * 4096 * 24 + 24 + 3
    assert HyperConnection(8, Options(mapping="identity")).phi.shape == (32, 8)


def test_parameters_stay_float32_and_can_be_double():
    assert {p.dtype for p in HyperConnection(4).parameters()} == {torch.float32}
    assert {p.dtype for p in HyperConnection(4, dtype=torch.float64).parameters()} == {torch.float64}


def test_a_bfloat16_module_still_computes_coefficients_in_float32():
    connection = HyperConnection(WIDTH).to(torch.bfloat16)
    pre, post, res = connection.coefficients(torch.randn(2, 4, WIDTH, dtype=torch.bfloat16))
    assert {pre.dtype, post.dtype, res.dtype} == {torch.float32}
    assert (res.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("width", [0, -3, 2.0, True, "8"])
def test_wrong_width(width):
    with pytest.raises(OptionError, match="expected a positive integer, the size of the feature axis"):
        HyperConnection(width)


def test_wrong_streams_are_named():
    with pytest.raises(
        ShapeError, match=r"3 streams \[2, 3, 10\] float32 .* need phi \[30, 15\].* got \[40, 24\] float32"
    ):
        HyperConnection(WIDTH).coefficients(torch.randn(2, 3, WIDTH))
