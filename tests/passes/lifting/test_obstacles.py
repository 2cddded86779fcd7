"""Trunk operations that cannot run on streams, and what reports say of them."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.graphs import planned, trace
from torch import Tensor, fx, nn

from mhc_compile.passes import Reason
from mhc_compile.passes.lifting.rules import Obstacle, lifted_axis


@fx.wrap
def without_batching_rule(x: Tensor) -> Tensor:
    """An operation that `torch.func.vmap` cannot run."""
    if torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError("no batching rule\n(second line)")
    return x * 2


@fx.wrap
def without_batching_rule_for_streams(x: Tensor) -> Tensor:
    """An operation that `torch.func.vmap` runs on copies, but not on contiguous streams."""
    if torch._C._functorch.is_batchedtensor(x) and 0 not in torch._C._functorch.get_unwrapped(x).stride():
        raise RuntimeError("NYI")
    return x * 2


def blocked(m, x):
    y = without_batching_rule(x + m.f(x))
    return y + m.g(m.norm(y))


def test_exception_of_a_rule_is_in_the_rejections_that_it_causes(caplog):
    with caplog.at_level(logging.DEBUG, logger="mhc_compile"):
        plan = planned(blocked, min_chain_length=2)
    assert [rejection.reason for rejection in plan.rejections] == [Reason.CHAIN_TOO_SHORT] * 2
    for rejection in plan.rejections:
        assert rejection.message.endswith(
            "It ends because 'without_batching_rule' cannot run on streams: RuntimeError: no batching rule"
        )
    (record,) = [record for record in caplog.records if record.name.endswith("compound_rules")][:1]
    assert record.exc_info is not None


def test_operation_is_tried_in_the_layout_of_streams():
    plan = planned(lambda m, x: (y := without_batching_rule_for_streams(x + m.f(x))) + m.g(y), min_chain_length=2)
    assert all("RuntimeError: NYI" in rejection.message for rejection in plan.rejections)
    assert len(plan.rejections) == 2


def test_exception_in_a_shortcut_is_in_its_rejection():
    plan = planned(lambda m, x: without_batching_rule(x) + m.f(m.norm(x)))
    (rejection,) = plan.rejections
    assert rejection.reason is Reason.PROJECTED_SKIP
    assert "RuntimeError: no batching rule" in rejection.message


def test_ordinary_end_of_a_chain_is_not_explained_by_exceptions():
    plan = planned(lambda m, x: (y := m.g(x + m.f(x))) + m.f(m.norm(y)), min_chain_length=2)
    assert [rejection.reason for rejection in plan.rejections] == [Reason.CHAIN_TOO_SHORT] * 2
    assert not any("because" in rejection.message for rejection in plan.rejections)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.f(x), "a contraction"),
        (lambda m, x: x.relu_(), "in place"),
        (lambda m, x: torch.rand_like(x), "no rule"),
        (blocked, "no batching rule"),
    ],
)
def test_obstacles_give_their_reason(forward, reason):
    calls = [node for node in trace(forward).graph.nodes if node.op.startswith("call")]
    node = next((node for node in calls if node.target is without_batching_rule), calls[0])
    (operand,) = node.all_input_nodes
    found = lifted_axis(node, [operand], {operand: 2})
    assert isinstance(found, Obstacle)
    assert reason in str(found)


@pytest.mark.parametrize(
    ("dropout", "lifts"), [(nn.Dropout(), True), (nn.Dropout1d(), True), (nn.AlphaDropout(), False)]
)
def test_one_mask_serves_all_streams_unless_the_dropout_shifts(dropout, lifts):
    module = fx.symbolic_trace(nn.Sequential(dropout))
    x, node, _ = module.graph.nodes
    for one in (x, node):
        one.meta["example_value"] = torch.zeros(2, 3, 4)
    found = lifted_axis(node, [x], {x: 2})
    assert found == 2 if lifts else isinstance(found, Obstacle)
