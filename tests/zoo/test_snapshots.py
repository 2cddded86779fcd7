"""The site tree of every family, as it was reviewed. `pytest --regenerate` writes the trees anew; the difference is read before it is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_compile import zoo

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.mark.zoo(layers_and_modes={(2, "train"): "representative"})
def test_the_site_tree_is_the_reviewed_one(family, layers, mode, traced, request):
    tree = str(traced(family, layers, mode))
    file = SNAPSHOTS / f"{family.name}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(tree)
    assert file.exists(), f"no snapshot of {family.name}; write it with pytest --regenerate"
    assert tree == file.read_text(), f"{family.name} is rewritten in another way than reviewed"


def test_every_snapshot_has_a_family_and_every_family_a_snapshot():
    assert {file.stem for file in SNAPSHOTS.glob("*.txt")} == {family.name for family in zoo.families()}


def test_a_tree_names_no_nodes_lines_or_places(traced):
    tree = str(traced(zoo.get("resnet"), 2, "train"))
    assert tree.startswith("2 layers, train: 2 sites,")
    assert "  stages.0.mhc.f" in tree
    assert "C=8 axis=1" in tree
    assert ".py" not in tree
    assert "/" not in tree
