"""`mhc check`, in this process; `tests/test_cli.py` drives it through its entry point."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mhc_compile.cli.check import command

MODELS = """
import torch
from helpers.builders import Small, points

def small():
    return Small(), (points(),)

def nothing():
    return torch.nn.Linear(3, 3), (points(),)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    (tmp_path / "checked_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(command, [*arguments, "--inner-backend", "eager"], obj={})


def test_equal_model_ends_with_the_verdict_and_exit_code_0(check):
    done = check("checked_models.py:small")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Small: plain and rewritten, train, float32, eager, seed 0")
    assert done.stdout.rstrip().splitlines()[-1].startswith("ok: ")
    assert "Largest errors" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_all_lists_every_tensor(check):
    done = check("checked_models.py:small", "--all", "--eval", "--dtype", "float64")
    assert done.exit_code == 0, done.output
    assert "eval, float64" in done.stdout
    for name in ("inwards.weight", "pair.first.bias", "live: pair.mhc.second.phi", "batch 10: output"):
        assert name in done.stdout


def test_deviating_tensor_is_named_with_exit_code_1(check):
    done = check("checked_models.py:small", "--tolerance", "1e-30")
    assert done.exit_code == 1
    assert "not ok: gradients: " in done.stdout
    assert "DIFFERS" in done.stdout


def test_nothing_rewritten_is_exit_code_1(check):
    done = check("checked_models.py:nothing")
    assert done.exit_code == 1
    assert "not ok: nothing was rewritten" in done.stdout


@pytest.mark.slow
def test_weights_are_loaded_before_the_model_is_checked(check, tmp_path):
    import torch
    from helpers.builders import Small, points

    import mhc_compile

    saved = Small()
    mhc_compile.attach(saved, points())
    torch.save(saved.state_dict(), tmp_path / "saved.pt")
    done = check("checked_models.py:small", "--weights", "saved.pt")
    assert done.exit_code == 0, done.output
    assert "with the hyper-connections that the model had" in " ".join(done.stdout.split())


def test_a_model_without_memory_is_wrong_usage(check):
    done = check("hf:gpt2", "--full-size")
    assert done.exit_code == 2
    assert "--full-size models have no memory without --weights FILE" in done.stderr
