"""`mhc zoo` and `zoo:` targets. Commands that print a table run in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mhc_compile.cli import _group
from mhc_compile.errors import MhcError


def mhc(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mhc_compile", *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_the_table_at_80_columns():
    done = mhc("zoo", "pre-norm", "trap-cubic-gelu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0].split()[:4] == ["model", "mode", "g", "sites"]
    assert any(line.split()[:4] == ["pre-norm", "train", "1", "4/4"] for line in lines)
    assert any("no-contraction 2" in line for line in lines)
    assert lines[-1].startswith("2 checked: 2 ok; 4 sites rewritten, 2 additions skipped; largest gradient error ")
    assert done.stderr == ""


@pytest.mark.slow
def test_the_table_at_140_columns_has_both_errors_and_both_modes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    done = CliRunner().invoke(_group, ["zoo", "stochastic-depth", "--mode", "both"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 140
    assert {"forward", "gradients"} <= set(done.stdout.splitlines()[0].split())
    assert [line.split()[1] for line in done.stdout.splitlines()[1:3]] == ["train", "eval"]


def test_a_deviation_is_exit_code_1_and_says_what():
    done = CliRunner().invoke(_group, ["zoo", "pre-norm", "--init", "random", "--json"])
    assert done.exit_code == 1
    data = json.loads(done.stdout)
    assert data["counts"] == {"deviates": 1}
    assert "deviates by" in data["outcomes"][0]["message"]
    assert "pre-norm train: output deviates" in done.stderr


def test_json_has_every_figure():
    done = CliRunner().invoke(_group, ["zoo", "siamese", "--layers", "3", "--structure", "--json"])
    assert done.exit_code == 0, done.output
    (outcome,) = json.loads(done.stdout)["outcomes"]
    assert outcome["chains"] == outcome["expected_chains"] == [3, 3]
    assert (outcome["sites"], outcome["layers"], outcome["rejected"]) == (6, 3, {"independent": 1})
    assert outcome["error_forward"] is None


def test_list_shows_chains_of_one_group():
    done = CliRunner().invoke(_group, ["zoo", "--list", "--group", "topology", "--layers", "4"])
    assert done.exit_code == 0, done.output
    assert any(line.split() == ["siamese", "topology", "torch", "4,", "4"] for line in done.stdout.splitlines())
    assert "resnet" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zoo", "resnett"), "the zoo has no family 'resnett'; near names: resnet"),
        (("zoo", "--group", "visoin"), "the zoo has no group 'visoin'; expected one of"),
        (("explain", "zoo:resnett"), "the zoo has no family 'resnett'; near names: resnet"),
        (("explain", "zoo:resnet", "--set", "depth=3"), "zoo: targets have one setting, layers=N"),
    ],
)
def test_a_wrong_name_is_an_error_with_near_names(arguments, words):
    done = CliRunner().invoke(_group, arguments)
    assert isinstance(done.exception, MhcError)  # which `main` prints as one paragraph
    assert words in str(done.exception)
    assert done.stdout == ""


def test_wrong_option_is_reported_before_a_model_is_built():
    done = CliRunner().invoke(_group, ["zoo", "resnet", "--streams", "9"])
    assert done.exit_code == 2
    assert "option 'streams' is 9; expected an integer from 1 to 8" in done.stderr


def test_a_family_is_a_target_of_explain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(_group, ["explain", "zoo:parallel", "--set", "layers=3"])
    assert done.exit_code == 0, done.output
    assert "Embedded: 3 residual adds rewritten, 0 additions skipped" in done.stdout


def test_importing_the_zoo_needs_no_torch():
    script = "import sys; from mhc_compile.tools import zoo; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
