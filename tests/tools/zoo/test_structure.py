"""Structure of every family, traced once for all assertions on it.

The chains are those of the formula, traps are rejected for the reasons of their family, and the
site tree is the reviewed one. `pytest --regenerate` writes the trees; review the difference before
you commit it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from mhc_compile.passes.analysis.aliases import Aliases
from mhc_compile.passes.planning import planner
from mhc_compile.passes.planning.match_residuals import Findings
from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.check import check, deviation
from mhc_compile.tools.zoo.family import Expected

SNAPSHOTS = Path(__file__).parent / "snapshots"
TRAPS = ("traps", "traps_on_trunk")


@pytest.mark.zoo(runs={(2, "train"): True, (3, "eval"): False})
def test_structure_is_expected_and_reviewed(family, layers, mode, traced, request):
    found, expected = traced(family, layers, mode), family.expected(layers, mode)
    assert (expected.reasons is not None) == (family.group in TRAPS)
    assert expected.reasons is None or expected.reasons
    assert deviation(found.lengths, found.reasons, expected) == ""
    if (layers, mode) != (2, "train"):
        return
    file = SNAPSHOTS / f"{family.name}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(str(found))
    assert file.exists(), f"no snapshot of {family.name}; write it with pytest --regenerate"
    assert str(found) == file.read_text(), f"{family.name} is rewritten in another way than reviewed"


@pytest.mark.parametrize("name", ["resnet", "break-in-middle"])
def test_structure_in_eval_mode_at_another_depth(name, traced):
    family = zoo.get(name)
    found = traced(family, 3, "eval")
    assert deviation(found.lengths, found.reasons, family.expected(3, "eval")) == ""


def test_formulas_grow_with_the_depth():
    fixed = {
        "mobilenet-v2",
        "mobilevit",
        "residual-lstm",
        "gated-merge",
        "densenet",
        "deepseek-v4",
    }
    for family in zoo.list_families():
        if family.group in TRAPS:
            continue
        few, many = (sum(family.expected(layers, "train").rewritten(1)) for layers in (2, 5))
        assert (few == many) == (family.name in fixed), family.name


def test_deviations_from_the_defaults_have_a_reason():
    families = zoo.list_families()
    assert len(families) >= 244
    assert sum(family.needs == "torch" for family in families) >= 126
    for family in families:
        assert bool(family.because) == (family.double or family.tolerance != 1e-5 or not family.differentiable_inputs)


def test_a_blind_finder_is_noticed(monkeypatch):
    monkeypatch.setattr(planner, "find", lambda graph, provenance, edges: Findings((), (), Aliases(graph)))
    outcome = check(zoo.get("pre-norm"), preserve=False)
    assert outcome.status == "deviates"
    assert outcome.message == "chains none, expected 4"


@pytest.mark.parametrize(
    ("chains", "rejected", "words"),
    [
        ((4, 2), {"chain-too-short": 1}, ""),
        ((4, 2), {}, "0 sites in chains that are too short, expected 1"),
        ((4,), {"chain-too-short": 1}, "chains 4, expected 4 + 2 (a note)"),
        ((4, 2, 2), {"chain-too-short": 1}, "chains 4 + 2 + 2, expected 4 + 2 (a note)"),
    ],
)
def test_a_deviation_is_one_line(chains, rejected, words):
    assert deviation(chains, Counter(rejected), Expected((2, 4, 1), note="a note")) == words


def test_an_unknown_family_lists_near_names():
    with pytest.raises(zoo.UnknownFamilyError, match="the zoo has no family 'resnett'; near names: resnet"):
        zoo.get("resnett")
    with pytest.raises(zoo.UnknownFamilyError, match=r"no group 'visoin'; expected one of .*vision"):
        zoo.list_families("visoin")


def test_build_is_deterministic_and_keeps_the_rng_state():
    torch.manual_seed(7)
    one, two = (zoo.get("dit").build(2) for _ in range(2))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    for (name, a), b in zip(one[0].state_dict().items(), two[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def test_every_snapshot_has_a_family():
    assert {file.stem for file in SNAPSHOTS.glob("*.txt")} == {family.name for family in zoo.list_families()}


def test_a_tree_names_no_nodes_lines_or_places(traced):
    tree = str(traced(zoo.get("resnet"), 2, "train"))
    assert tree.startswith("2 layers, train: 2 sites,")
    assert "  stages.0.mhc.f" in tree
    assert "C=8 axis=1" in tree
    assert ".py" not in tree
    assert "/" not in tree
