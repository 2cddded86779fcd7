"""Chains: what shares streams, what is lifted, and what stands alone."""

from __future__ import annotations

import pytest
import torch
from helpers.graphs import C, planned
from torch import nn

from mhc_compile.passes import Reason
from mhc_compile.passes.analysis.op_info import op_name


def test_sites_follow_the_trunk():
    plan = planned(lambda m, x: (y := x + m.f(x)) + m.g(y))
    assert [len(chain.sites) for chain in plan.chains] == [2]
    assert str(plan.chains[0].start) == "x"


def test_views_of_the_tokens_are_lifted():
    def forward(m, x):
        y = (x + m.f(x)).reshape(-1, C)
        y = (y + m.g(y)).view(2, 4, C).contiguous()
        y = (y + m.f(y)).flatten(0, 1)
        return y + m.g(y)

    plan = planned(forward)
    assert [len(chain.sites) for chain in plan.chains] == [4]
    assert [[str(n.target) for n in region.nodes] for region in plan.chains[0].links] == [
        [],
        ["reshape"],
        ["view", "contiguous"],
        ["flatten"],
    ]


def test_a_view_of_the_features_ends_the_chain():
    def forward(m, x):
        y = x + m.f(x)
        z = y.reshape(2, 2, 2, C).reshape(2, 4, C)  # fine
        z = z + m.g(z)
        w = z.reshape(2, C, 4).reshape(2, 4, C)  # features torn apart
        return w + m.f(w)

    plan = planned(forward)
    assert [len(chain.sites) for chain in plan.chains] == [2, 1]


def test_a_projection_of_the_trunk_ends_the_chain_and_short_chains_are_rejected():
    def forward(m, x):
        y = m.f(x + m.f(x))
        return m.g(y + m.g(y))

    assert [len(chain.sites) for chain in planned(forward).chains] == [1, 1]
    plan = planned(forward, min_chain_length=2)
    assert not plan.chains
    assert [rejection.reason for rejection in plan.rejections] == [Reason.CHAIN_TOO_SHORT] * 2
    assert "its chain has 1 site; min_chain_length=2" in plan.rejections[0].message


aten = torch.ops.aten


def rms(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.vector


@pytest.mark.parametrize(
    ("between", "names"),
    [
        (lambda m, y: m.norm_f(y), ["layer_norm"]),
        (lambda m, y: torch.relu(y), ["relu"]),
        (lambda m, y: y * 0.5, ["mul"]),
        (lambda m, y: y * m.vector, ["mul"]),
        (lambda m, y: y.double().float(), ["double", "float"]),
        (rms, ["pow", "mean", "add", "rsqrt", "mul", "mul"]),
        (lambda m, y: y.transpose(0, 1), ["transpose"]),
        (lambda m, y: nn.functional.dropout(y, 0.1, training=False), ["dropout"]),
        (lambda m, y: aten._to_copy.default(y, dtype=torch.float64).float(), ["_to_copy", "float"]),
        (lambda m, y: aten._unsafe_view.default(y, [8, C]).view(2, 4, C), ["_unsafe_view", "view"]),
        (lambda m, y: nn.functional.dropout(y, 0.1), ["dropout"]),
        (lambda m, y: y.softmax(1), ["softmax"]),
        (lambda m, y: y * torch.rand_like(y), ["mul"]),
        (lambda m, y: y + 0.5 * torch.ones_like(y), ["add"]),
        (lambda m, y: y + (torch.tanh(y) - y).detach(), ["tanh", "neg", "add", "add"]),
        (lambda m, y: y.roll(1, 1), ["roll"]),
        (lambda m, y: y[:, 1:], ["getitem"]),
        (lambda m, y: nn.functional.pad(y, (0, 0, 1, 0)), ["pad"]),
        (
            lambda m, y: nn.functional.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2),
            ["transpose", "avg_pool1d", "transpose"],
        ),
        (lambda m, y: torch.cat([y, m.vector.expand(2, 1, C)], 1), ["cat"]),
    ],
)
def test_cheap_trunk_operations_are_lifted(between, names):
    plan = planned(lambda m, x: (y := between(m, x + m.f(x))) + m.g(y))
    assert [len(chain.sites) for chain in plan.chains] == [2]
    assert [op_name(node) for node in plan.chains[0].links[1].nodes] == names


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: m.f(y),  # a projection
        lambda m, y: nn.functional.rrelu(y, training=True),  # random numbers, and no mask
        lambda m, y: y.reshape(2, C, 4).transpose(1, 2),  # features torn apart
        lambda m, y: y.unbind(1)[0].unsqueeze(1).expand(2, 4, C),  # through a tuple
        lambda m, y: y + m.f(y).detach(),  # depends on the trunk through a projection
    ],
)
def test_other_trunk_operations_end_the_chain(between):
    plan = planned(lambda m, x: (y := between(m, x + m.f(x))) + m.g(y))
    assert [len(chain.sites) for chain in plan.chains] == [1, 1]


def test_nested_blocks_have_chains_of_their_own_and_the_outer_block_carries_the_trunk():
    def forward(m, x):
        for _ in range(2):
            y = x + m.f(x)
            y = y + m.g(y)
            x = x + m.f(y)  # a block of residual blocks
        return x

    plan = planned(forward)
    assert sorted(len(chain.sites) for chain in plan.chains) == [2, 2, 2]
    assert not plan.rejections
    names = [[str(site.add) for site in chain.sites] for chain in plan.chains]
    assert ["add_2", "add_5"] in names  # the outer trunk


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_long_skip_is_no_site_and_the_chain_runs_through_it(weight):
    def forward(m, x):
        x = x + m.f(x)
        first = x
        x = x + m.g(x)
        x = x + m.f(x)
        x = (first if weight is None else first * weight) + x
        return x + m.g(x)

    plan = planned(forward)
    assert [[str(site.add) for site in chain.sites] for chain in plan.chains] == [["add", "add_1", "add_2", "add_4"]]
    assert [rejection.reason for rejection in plan.rejections] == [Reason.LONG_SKIP]
    assert [str(node) for node in plan.chains[0].links[-1].nodes] == ["add_3"]


def test_a_branch_that_ends_in_a_residual_add_of_its_own_is_no_long_skip():
    def forward(m, x):
        for _ in range(2):
            h = m.f(x)
            x = x + (h + m.g(h))
        return x

    plan = planned(forward, min_chain_length=2)
    assert [[str(site.add) for site in chain.sites] for chain in plan.chains] == [["add_1", "add_3"]]
    assert [rejection.reason for rejection in plan.rejections] == [Reason.SIDE_ADD] * 2


def test_a_chain_runs_through_an_add_of_something_else():
    def forward(m, x):
        other = torch.relu(m.vector.expand(2, 4, C))
        x = x + m.f(x)
        x = x + other
        return x + m.g(x)

    plan = planned(forward, min_chain_length=2)
    assert [len(chain.sites) for chain in plan.chains] == [2]
    assert [op_name(node) for node in plan.chains[0].links[1].nodes] == ["add"]


def test_a_fork_begins_a_second_chain():
    def forward(m, x):
        x = x + m.f(x)
        left = x + m.f(x)
        left = left + m.g(left)
        right = x + m.g(x)
        right = right + m.f(right)
        return left * right

    assert [len(chain.sites) for chain in planned(forward).chains] == [3, 2]


def test_two_trunks_are_two_chains():
    def forward(m, x):
        a = x * 2
        b = x * 3
        for _ in range(2):
            a = a + m.f(a)
            b = b + m.g(b)
        return a * b

    assert [len(chain.sites) for chain in planned(forward).chains] == [2, 2]


def test_the_plan_is_linear():
    """Steps of `find` and `plan` grow with the graph and not with its square, though a bias made at
    the start is added in every layer.
    """
    from mhc_compile.passes.analysis import aliases, dependence

    def steps(depth: int) -> int:
        seen = 0

        def counted(function):
            def counting(*arguments):
                nonlocal seen
                seen += 1
                return function(*arguments)

            return counting

        def forward(m, x):
            bias = torch.tanh(m.g(x)).mean(1, keepdim=True)
            for _ in range(depth):
                x = x + m.f(m.norm(x) + bias)
            return x

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dependence, "passes_value", counted(dependence.passes_value))
            patch.setattr(dependence.Dependence, "value", counted(dependence.Dependence.value))
            patch.setattr(aliases.Aliases, "writers", counted(aliases.Aliases.writers))
            assert len(planned(forward).sites) == depth
        return seen

    assert steps(80) <= 2 * steps(40) + 2


def test_dim_one_inputs_do_not_break():
    plan = planned(lambda m, x: x + nn.functional.linear(x, m.weight), torch.randn(C))
    assert [rejection.reason for rejection in plan.rejections] == [Reason.NO_FEATURE_AXIS]


def test_a_skip_through_another_chain_is_no_site():
    def forward(m, x):
        x = x + m.f(x)
        y = torch.relu(x)
        z = y + y
        return z + m.f(z), z + m.g(y)

    plan = planned(forward)
    assert [len(chain.sites) for chain in plan.chains] == [2]
    (crossing,) = [rejection for rejection in plan.rejections if rejection.reason is Reason.SIDE_ADD]
    assert "carries on" in str(crossing)
