"""`mhc diff` through its real entry point, and its reviewed output at two widths."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SNAPSHOTS = Path(__file__).parent / "snapshots"


def diff(*arguments, columns=80, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "mhc_compile", "diff", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"},
        check=False,
    )


def assert_reviewed(name, text, request):
    text = re.sub(r"(\.py):\d+", r"\1:LINE", text)  # lines of the zoo's files, which move
    file = SNAPSHOTS / f"{name}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(text)
    assert text == file.read_text(), "if this is meant, write it again with pytest --regenerate"


@pytest.mark.parametrize(
    ("name", "columns", "arguments"),
    [
        ("decoder-80", 80, ("zoo:pre-norm", "--set", "layers=4")),
        pytest.param("decoder-140", 140, ("zoo:pre-norm", "--set", "layers=4"), marks=pytest.mark.slow),
        ("side-by-side-140", 140, ("zoo:pre-norm", "--set", "layers=4", "--side-by-side")),
        pytest.param("lifted-80", 80, ("zoo:activated-in-place",), marks=pytest.mark.slow),
        pytest.param("plan-80", 80, ("zoo:gated-recurrence", "--stage", "plan"), marks=pytest.mark.slow),
        pytest.param("lower-80", 80, ("zoo:pre-norm", "--stage", "lower"), marks=pytest.mark.slow),
    ],
)
def test_text(name, columns, arguments, request):
    done = diff(*arguments, columns=columns)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert_reviewed(name, done.stdout, request)


@pytest.mark.slow
def test_every_kind_of_file_at_once(tmp_path):
    files = [f"--{kind}={tmp_path / 'sub' / kind}" for kind in ("html", "svg", "dot", "mermaid")]
    done = diff("zoo:pre-norm", *files, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["schema"] == "mhc-compile/diff/1"
    assert sum(row["change"] == "replaced" for row in data["graphs"][0]["rows"]) == 4
    assert done.stderr.count("wrote ") == 4
    assert ElementTree.parse(tmp_path / "sub" / "svg").getroot().tag.endswith("svg")
    assert (tmp_path / "sub" / "html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "sub" / "mermaid").read_text().startswith("flowchart")
    assert (tmp_path / "sub" / "dot").read_text().startswith("digraph")


@pytest.mark.slow
def test_a_drawing_on_stdout_and_nothing_else():
    done = diff("zoo:pre-norm", "--mermaid", "-", "--quiet")
    assert done.stdout.startswith("flowchart")
    assert done.stderr == ""


def test_nothing_to_rewrite_is_a_finding():
    done = diff("zoo:trap-cubic-gelu")
    assert done.returncode == 1
    assert "Nothing changes." in done.stdout


def test_a_stage_that_does_not_exist_is_wrong_usage():
    done = diff("zoo:pre-norm", "--stage", "lowr")
    assert done.returncode == 2
    assert "did you mean 'lower'" in done.stderr


@pytest.mark.slow
def test_kernels():
    done = diff("zoo:pre-norm", "--kernels", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["counts"]
    # Four sites: the first reads, three write and read in one, the last closes.
    assert counts["forward"]["mhc"] == [0, 5]
    assert counts["backward"]["mhc"] == [0, 5]
    assert counts["forward"]["library"][0] == counts["forward"]["library"][1]
