"""Traps: the reasons that they cover, and that they catch a wrong finder."""

from __future__ import annotations

import pytest

from mhc_compile.passes import Reason
from mhc_compile.passes.analysis import dependence as reach
from mhc_compile.passes.analysis import sum_terms as terms
from mhc_compile.passes.planning import match_residuals as finding
from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.check import check


def test_traps_without_a_trunk_have_no_site():
    for family in zoo.list_families("traps"):
        assert family.expected(3, "train").rewritten(1) == ()


def test_the_reasons_of_the_traps_are_many():
    named = {reason for family in zoo.list_families() for reason in family.expected(2, "train").reasons or ()}
    assert named >= {
        Reason.BROADCAST, Reason.DTYPE, Reason.INDEPENDENT, Reason.LONG_SKIP, Reason.MULTI_STREAM, Reason.NOT_DIFFERENTIABLE,
        Reason.NO_CONTRACTION, Reason.NO_FEATURE_AXIS, Reason.PROJECTED_SKIP, Reason.SAME_VALUE, Reason.SIDE_ADD,
        Reason.TOKEN_SHIFT,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("switch", "family"), [("contracts", "trap-cubic-gelu"), ("passes_value", "trap-straight-through")]
)
def test_the_trap_catches_a_finder_without_the_rule(monkeypatch, switch, family):
    assert check(zoo.get(family), preserve=False).status == "ok"
    for module in (reach, finding, terms):
        monkeypatch.setattr(module, switch, lambda *_: True, raising=False)
    outcome = check(zoo.get(family), preserve=False)
    assert outcome.status == "deviates", outcome


@pytest.mark.parametrize(
    ("rule", "family"),
    [
        (("shifted", lambda *_: None), "trap-gated-shift"),
        pytest.param(("shifted", lambda *_: None), "trap-nanochat", marks=pytest.mark.slow),
        pytest.param(("_Finder._gated", lambda *_: None), "trap-nanochat-decoding", marks=pytest.mark.slow),
    ],
)
def test_the_trap_of_a_token_shift_catches_a_finder_without_the_rule(monkeypatch, rule, family):
    monkeypatch.setattr(f"{finding.__name__}.{rule[0]}", rule[1])
    assert check(zoo.get(family), preserve=False).status == "deviates"


def test_a_side_add_is_no_site_however_short_a_chain_may_be(traced):
    found = traced(zoo.get("trap-side-add"), 2, "train")
    assert found.reasons == {Reason.SIDE_ADD.value: 2}
    rewritten = check(zoo.get("trap-side-add"), options={"min_chain_length": 1}, preserve=False)
    assert rewritten.chains == (2,)
