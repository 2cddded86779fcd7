"""Which additions are sites, and for the others the right reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import C, planned

import mhc_compile
from mhc_compile.passes import Reason, Rejection, Site, normalize, plan_chains
from mhc_compile.passes.analysis.op_info import op_name
from mhc_compile.passes.analysis.provenance import Provenance

R = Reason
aten = torch.ops.aten


@pytest.mark.parametrize(
    ("forward", "adds"),
    [
        (lambda m, x: x + m.f(x), 1),
        (lambda m, x: m.f(m.norm(x)) + x, 1),
        (lambda m, x: x + torch.sigmoid(m.g(x)) * m.f(x), 1),
        (lambda m, x: x + m.f(m.norm(x)) + m.g(m.norm(x)), 2),  # parallel attention and MLP
        (lambda m, x: (m.f(x) + m.g(x)) + x, 2),
        (lambda m, x: x + F.linear(x, m.weight), 1),
        (lambda m, x: x + F.scaled_dot_product_attention(x, x, x), 1),
        (lambda m, x: x + F.dropout(m.f(x), 0.1), 1),
        (lambda m, x: x + m.f(x.reshape(-1, C)).reshape(2, 4, C), 1),
        (lambda m, x: x + m.f(x.transpose(0, 1)).transpose(1, 0), 1),
        (lambda m, x: x + (x @ m.weight).unflatten(-1, (2, 3)).flatten(-2), 1),
        (lambda m, x: x + m.f(x).mean(1, keepdim=True), 1),  # a branch that is broadcast
        (lambda m, x: x + m.f(x).double(), 1),  # the trunk becomes double
        (lambda m, x: m.f(x).add_(x), 1),
        (lambda m, x: x - m.f(x), 1),
        (lambda m, x: torch.addcmul(x, m.vector, m.f(x)), 1),
        (lambda m, x: x + torch.fft.fft2(m.norm(x)).real, 1),
    ],
)
def test_residual_adds_are_sites(forward, adds):
    plan = planned(forward)
    assert len(plan.sites) == 1
    assert len(plan.sites[0].adds) == adds
    assert plan.sites[0].width == C
    assert str(plan.sites[0].skip) == "x"
    assert not plan.rejections


@pytest.mark.parametrize(
    ("forward", "skip", "shortcut"),
    [
        (lambda m, x: 0.5 * x + m.f(x), "mul", ["mul"]),  # DeepNorm
        (lambda m, x: x * m.vector + m.f(x), "mul", ["mul"]),
        (lambda m, x: m.f(x) + F.dropout(x, 0.1), "dropout", ["dropout"]),
        (lambda m, x: x[:, 1:] + m.f(x)[:, 1:], "getitem", ["getitem"]),
        (lambda m, x: F.avg_pool1d(x, 1) + m.f(x), "avg_pool1d", ["avg_pool1d"]),
        (lambda m, x: x.double() + m.f(x), "double", ["double"]),
        (lambda m, x: x.add_(m.f(x)), "clone", []),  # the caller's tensor
        (lambda m, x: ((t := x * 1.0), t[:, 0].zero_(), t + m.f(t))[2], "mul", []),  # written before anybody reads it
    ],
)
def test_the_skip_may_come_from_the_trunk_by_cheap_operations(forward, skip, shortcut):
    plan = planned(forward)
    assert [str(site.skip) for site in plan.sites] == [skip]
    assert [op_name(node) for node in plan.sites[0].shortcut.nodes] == shortcut
    assert not plan.rejections


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.f(x) + m.vector, R.BROADCAST),
        (lambda m, x: m.f(x) + x.mean(1, keepdim=True), R.BROADCAST),  # the skip would be broadcast
        (lambda m, x: m.f(x) + m.g(x), R.INDEPENDENT),
        (lambda m, x: x + F.linear(torch.ones_like(x), m.weight), R.NOT_DIFFERENTIABLE),
        (lambda m, x: x + (m.f(x) - x).detach(), R.NOT_DIFFERENTIABLE),  # straight-through
        (lambda m, x: x + F.embedding(x.argmax(-1), m.weight), R.NOT_DIFFERENTIABLE),
        (lambda m, x: 0.5 * (x + 0.044715 * x**3), R.NO_CONTRACTION),  # tanh-GELU
        (lambda m, x: x + x * m.vector, R.NO_CONTRACTION),
        (lambda m, x: x + m.norm(x), R.NO_CONTRACTION),
        (lambda m, x: x + m.f(m.vector) * (x @ x.transpose(1, 2) @ x), R.NO_CONTRACTION),  # the state of a recurrence
        (lambda m, x: x * torch.cos(x) + torch.sin(x) * x.roll(1), R.INDEPENDENT),  # rotary
        (lambda m, x: x + x, R.SAME_VALUE),
        (lambda m, x: x + m.f(x.reshape(2, -1)[:, :C]).unsqueeze(1).expand(2, 4, C), R.FEATURE_AXIS),
        (lambda m, x: x.sum() + m.f(x).sum(), R.NO_FEATURE_AXIS),
        (lambda m, x: torch.relu(m.norm(m.conv(m.f(x)))) + m.g(x), R.PROJECTED_SKIP),
        (lambda m, x: x[..., :3] + m.f(x)[..., :3], R.PROJECTED_SKIP),  # another width
        (lambda m, x: (torch.softmax(m.conv(x)[..., :4], -1) @ x) + m.f(m.g(x)), R.MULTI_STREAM),
        (lambda m, x: x + m.f(x + m.g(x)), R.SIDE_ADD),
        (lambda m, x: ((y := x + m.f(x)), y[:, 0].zero_(), y)[0], R.MUTATED_OPERAND),
        # Half the trunk is read before the write, by the shortcut: it has the old value.
        (lambda m, x: ((t := x * 1.0), (h := t * 0.5), t[:, 0].zero_(), h + m.f(t))[3], R.MUTATED_OPERAND),
    ],
)
def test_other_adds_are_rejected_with_the_right_reason(forward, reason):
    plan = planned(forward)
    assert len(plan.sites) == (reason is R.SIDE_ADD)
    assert reason in [rejection.reason for rejection in plan.rejections]
    for rejection in plan.rejections:
        assert isinstance(rejection, Rejection)
        assert rejection.message


@pytest.mark.parametrize(
    ("forward", "axis"),
    [
        (lambda m, x: x + m.f(x), -1),
        (lambda m, x: x + m.conv(x), 1),
        (lambda m, x: x + m.conv(torch.relu(x)), 1),
        (lambda m, x: x + m.f(x.transpose(0, 1)).transpose(0, 1), -1),
        (lambda m, x: x + m.conv(m.norm(x)), -1),  # token mixing: the norm says what the features are
        (lambda m, x: x + m.f(x).transpose(-1, -2).reshape(2, 4, C), -1),
        (lambda m, x: x + m.f(x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()), -1),  # RMSNorm by hand
        (
            lambda m, x: x + m.conv((d := x - x.mean(-1, keepdim=True)) * (d.square().mean(-1, keepdim=True)).rsqrt()),
            -1,
        ),
        (lambda m, x: x + m.f(x.mean(1, keepdim=True)), -1),  # pooled over tokens, no norm
        (lambda m, x: (t := x.transpose(1, 2)) + m.f(t.transpose(1, 2)).transpose(1, 2), 1),
    ],
)
def test_the_feature_axis_is_read_off_the_branch(forward, axis):
    plan = planned(forward)
    assert [site.axis for site in plan.sites] == [axis % 3]


def test_an_add_round_streams_of_an_earlier_run_is_rejected():
    def forward(m, x):
        first = x
        for _ in range(2):
            x = x + m.f(x)
        return m.g(first + x)

    from helpers.graphs import trace

    module = mhc_compile.rewrite(trace(forward), torch.randn(2, 4, C))
    plan = plan_chains(normalize(module.graph), Provenance(), min_chain_length=1)
    assert [rejection.reason for rejection in plan.rejections] == [R.REWRITTEN]
    assert not plan.sites


def gate(m, x):
    return torch.sigmoid(m.g(x))


def before(x):
    return F.pad(x, (0, 0, 1, -1))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x[:, 1:] + gate(m, x[:, 1:]) * x[:, :-1],
        lambda m, x: gate(m, x[:, 1:])[..., :1] * x[:, :-1] + x[:, 1:],
        lambda m, x: x[..., 1:, :] + gate(m, x)[..., 1:, :] * x[..., -4:3, :],
        lambda m, x: x + gate(m, x) * before(x),
        lambda m, x: x + gate(m, x) * (before(x) - x),  # RWKV-6
        lambda m, x: x + F.dropout(gate(m, x) * m.before(x), 0.1),
        lambda m, x: x + gate(m, x) * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
        lambda m, x: x + gate(m, x) * torch.cat([x.new_empty(0), x[:, -1:], x[:, :3]], -2),
        lambda m, x: x + gate(m, x) * torch.roll(x, 1, 1),
        lambda m, x: x + gate(m, x) * x.roll(shifts=(0, 2), dims=(0, -2)),
        lambda m, x: x + gate(m, x) * before(m.norm(x)),
        lambda m, x: x + gate(m, x) * F.pad(x.transpose(1, 2), (1, -1)).transpose(1, 2),
        lambda m, x: x.narrow(1, 1, 3) + gate(m, x).narrow(1, 1, 3) * x.narrow(1, 0, 3),
        lambda m, x: x[:, 1:] + gate(m, x[:, 1:]) * x.split([3, 1], 1)[0],
        lambda m, x: aten.slice.Tensor(x, 1, 1) + gate(m, x[:, 1:]) * aten.slice.Tensor(x, 1, 0, -1),
        lambda m, x: x + gate(m, x) * aten.constant_pad_nd.default(x, [0, 0, 1, -1]),
    ],
)
def test_gated_tokens_from_another_place_are_no_branch(forward):
    plan = planned(forward)
    assert not plan.sites
    assert R.TOKEN_SHIFT in [rejection.reason for rejection in plan.rejections]
    assert all(rejection.message for rejection in plan.rejections)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + gate(m, x) * x,
        lambda m, x: x[:, 1:] + gate(m, x[:, 1:]) * x[:, 1:],
        lambda m, x: x + m.f(before(x)),
        lambda m, x: x + m.f(before(x) - x) * gate(m, x),
        lambda m, x: x + gate(m, x) * before(m.f(x)),
        lambda m, x: x + torch.cat([m.f(x[:, :1]), x[:, 1:]], dim=1),  # class attention
        lambda m, x: x + gate(m, x) * F.pad(before(x), (0, 0, -1, 1)),
        lambda m, x: x + gate(m, x) * x.roll(1, -1),  # features, not tokens
        lambda m, x: x + gate(m, x)[..., :1] * m.vector.expand(2, 4, C),
        lambda m, x: x + m.conv(x.roll(1, 2)),  # shifted windows
    ],
)
def test_tokens_at_their_own_place_or_projected_are_a_branch(forward):
    plan = planned(forward)
    assert len(plan.sites) == 1, plan.rejections


def test_a_token_shift_leaves_the_branch_in_the_same_sum():
    plan = planned(lambda m, x: x + m.f(m.norm(x)) + gate(m, x) * before(x))
    assert [str(site.add) for site in plan.sites] == ["add"]
    assert [str(rejection.add) for rejection in plan.rejections] == ["add_1"]


def test_a_gate_on_what_does_not_come_from_the_trunk_is_no_branch():
    """A decoder adds the last token, which it has kept: `x + gate(x) * cached`."""

    def forward(m, x):
        cached, x = x.chunk(2, dim=1)
        return x + gate(m, m.norm(x))[..., :1] * torch.relu(cached)

    plan = planned(forward)
    assert not plan.sites
    assert "only its gate does" in plan.rejections[0].message


def test_complex_tensors_are_rejected():
    plan = planned(lambda m, x: torch.complex(x, x) + torch.complex(m.f(x), x))
    assert [rejection.reason for rejection in plan.rejections] == [R.DTYPE]
    assert "complex64" in plan.rejections[0].message


def test_integer_and_number_additions_are_no_candidates():
    plan = planned(lambda m, x: m.f(x) + 1.0 + (x.argmax(-1, keepdim=True) + x.argmin(-1, keepdim=True)).float() * 0)
    assert [r.reason for r in plan.rejections] == [R.BROADCAST]  # the one addition of floats


def test_a_site_inside_a_sum_that_is_none_is_found():
    """`(x + f(x)) + memory`: the sum as a whole depends on the memory, which does not depend
    on x.
    """
    memory = torch.randn(2, 4, C)
    plan = planned(lambda m, x: (x + m.f(x)) + m.vector.expand(2, 4, C), memory)
    assert [str(site.skip) for site in plan.sites] == ["x"]
    assert [rejection.reason for rejection in plan.rejections] == [R.INDEPENDENT]


def test_branches_that_share_an_inner_trunk_are_not_parallel():
    """`x + (dropout(y) + f(y))`, y computed from x: the inner sum is a residual add on y."""

    def forward(m, x):
        y = m.g(x)
        return (F.dropout(y, 0.1) + m.f(y)) + x

    plan = planned(forward)
    assert [str(site.skip) for site in plan.sites] == ["x"]
    assert [rejection.reason for rejection in plan.rejections] == [R.SIDE_ADD]


def test_every_addition_has_exactly_one_verdict():
    def forward(m, x):
        x = x + m.f(x)
        y = x + 0.1 * x**2
        return (y + m.vector) + m.g(x) + m.f(m.norm(x))

    from helpers.graphs import trace

    graph = trace(forward).graph
    additions = [n for n in graph.nodes if "add" in n.name]
    plan = planned(forward)
    verdicts = [add.name for site in plan.sites for add in site.adds] + [
        rejection.add.name for rejection in plan.rejections
    ]
    assert sorted(verdicts) == sorted(n.name for n in additions)
    assert {type(v) for v in (*plan.sites, *plan.rejections)} <= {Site, Rejection}


def test_every_reason_is_documented():
    for reason in Reason:
        assert reason.meaning.endswith("."), reason
        assert reason.example, reason
        assert reason.remedy, reason


def test_names_come_from_module_paths():
    plan = planned(lambda m, x: x + m.f(m.norm(x)))
    assert plan.sites[0].path == "mhc.f"
    plan = planned(lambda m, x: x + F.linear(m.norm(x), m.weight))
    assert plan.sites[0].path == "mhc.weight"


@pytest.mark.parametrize(
    ("forward", "axis"),
    [
        (lambda m, x: aten.add.Tensor(x, aten.linear.default(x, m.weight)), -1),
        (lambda m, x: x + aten.addmm.default(m.vector, x.view(-1, C), m.weight).view(2, 4, C), -1),
        (lambda m, x: x + aten._unsafe_view.default(aten.mm.default(x.view(-1, C), m.weight), [2, 4, C]), -1),
        (lambda m, x: x + aten.mm.default(m.rows.repeat(8, 2), x.view(8, C)).view(8, C).view(2, 4, C), -1),
        (lambda m, x: x + aten._unsafe_view.default(aten.mm.default(m.rows.repeat(8, 2), x.view(8, C)), [2, 4, C]), -1),
        (
            lambda m, x: (
                x + aten.addmm.default(m.vector, x.view(-1, C), m.weight).view(2, 4, C).view(2, C, 4).transpose(1, 2)
            ),
            -1,
        ),
        (lambda m, x: x + aten.baddbmm.default(x, x, m.weight.expand(2, C, C)), -1),
        (lambda m, x: x + aten.convolution.default(x, m.conv.weight, None, [1], [1], [1], False, [0], 1), 1),
        (lambda m, x: x + m.f(aten._native_batch_norm_legit_no_training.default(x, *[m.rows] * 4, 0.1, 1e-5)[0]), 1),
        (lambda m, x: x + m.conv(aten.native_layer_norm.default(x, [C], m.vector, None, 1e-5)[0]), -1),
        (
            lambda m, x: (
                x + aten._scaled_dot_product_flash_attention_for_cpu.default(*[x.unsqueeze(1)] * 3)[0].squeeze(1)
            ),
            -1,
        ),
    ],
)
def test_decomposed_operations_are_known_by_their_names_in_aten(forward, axis):
    plan = planned(forward)
    assert [site.axis for site in plan.sites] == [axis % 3], plan.rejections
