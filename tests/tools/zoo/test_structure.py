"""Every family, in training and in eval mode, at two depths: the chains are what the formula says, and the site tree is as it was reviewed.

`pytest --regenerate` writes the trees anew; the difference is read before it is committed. One file, so that one process traces each family once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_compile.passes.analysis.aliases import Aliases
from mhc_compile.passes.planning import chains as planning
from mhc_compile.passes.planning.match_residuals import Findings
from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.check import check, deviation
from mhc_compile.tools.zoo.family import Expected

SNAPSHOTS = Path(__file__).parent / "snapshots"
TRAPS = ("traps", "traps_on_trunk")
DEPTHS = {(2, "train"): "representative", (3, "eval"): "carried"}


@pytest.mark.zoo(layers_and_modes=DEPTHS, without=TRAPS)
def test_chains_are_those_of_the_formula(family, layers, mode, traced):
    found = traced(family, layers, mode)
    assert deviation(found.lengths, found.reasons, family.expected(layers, mode)) == ""


def test_formulas_grow_with_the_depth():
    fixed = {
        "mobilenet-v2",
        "mobilevit",
        "residual-lstm",
        "gated-merge",
        "densenet",
        "deepseek-v4",
    }
    for family in zoo.families():
        if family.group in TRAPS:
            continue
        few, many = (family.expected(layers, "train").sites for layers in (2, 5))
        assert (few == many) == (family.name in fixed), family.name


def test_the_zoo_is_large_and_every_deviation_from_the_defaults_has_a_reason():
    families = zoo.families()
    assert len(families) >= 150
    assert sum(family.needs == "torch" for family in families) >= 60
    for family in families:
        assert bool(family.because) == (family.double or family.tolerance != 1e-5 or not family.differentiable_inputs)


def test_a_blind_finder_is_noticed(monkeypatch):
    monkeypatch.setattr(planning, "find", lambda graph, provenance, edges: Findings((), (), Aliases(graph)))
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
    from collections import Counter

    assert deviation(chains, Counter(rejected), Expected((2, 4, 1), note="a note")) == words


def test_an_unknown_family_lists_near_names():
    with pytest.raises(zoo.UnknownFamilyError, match="the zoo has no family 'resnett'; near names: resnet"):
        zoo.get("resnett")
    with pytest.raises(zoo.UnknownFamilyError, match=r"no group 'visoin'; expected one of .*vision"):
        zoo.families("visoin")


def test_a_family_is_built_alike_every_time_and_leaves_random_numbers_alone():
    import torch

    torch.manual_seed(7)
    one, two = (zoo.get("dit").build(2) for _ in range(2))
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    for (name, a), b in zip(one[0].state_dict().items(), two[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


@pytest.mark.zoo(layers_and_modes={(2, "train"): "representative"})
def test_the_site_tree_is_the_reviewed_one(family, layers, mode, traced, request):
    tree = str(traced(family, layers, mode))
    file = SNAPSHOTS / f"{family.name}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(tree)
    assert file.exists(), f"no snapshot of {family.name}; write it with pytest --regenerate"
    assert tree == file.read_text(), f"{family.name} is rewritten in another way than reviewed"


def test_every_snapshot_has_a_family():
    assert {file.stem for file in SNAPSHOTS.glob("*.txt")} <= {family.name for family in zoo.families()}


def test_a_tree_names_no_nodes_lines_or_places(traced):
    tree = str(traced(zoo.get("resnet"), 2, "train"))
    assert tree.startswith("2 layers, train: 2 sites,")
    assert "  stages.0.mhc.f" in tree
    assert "C=8 axis=1" in tree
    assert ".py" not in tree
    assert "/" not in tree
