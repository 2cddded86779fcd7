"""`mhc stability`, in this process."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mhc_compile.cli.stability import command

MODELS = """
import torch
from helpers.builders import Small, points

def small():
    return Small(), (points(),)

def nothing():
    return torch.nn.Linear(3, 3), (points(),)
"""


@pytest.fixture
def stability(tmp_path, monkeypatch):
    (tmp_path / "measured_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(command, list(arguments), obj={})


def test_report_names_a_fresh_start(stability):
    done = stability("measured_models.py:small")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Small: residual mixing over depth, train, float32, 2 sites in 1 chain")
    assert "All streams are copies of each other" in done.stdout
    assert "1.000 forward, 1.000 backward" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_random_logits_show_the_effect_of_the_mapping(stability, tmp_path):
    arguments = ("measured_models.py:small", "--json", "--eval", "--random-logits", "2")
    done = stability(*arguments, "--png", "a.png", "--seed", "3")
    assert done.exit_code == 0, done.output
    bound = json.loads(done.stdout)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    loose = json.loads(stability(*arguments, "--mapping", "unconstrained").stdout)
    assert bound["mode"] == loose["mode"] == "eval"
    assert bound["summary"]["amax_forward"] < 1.001 < 2 < loose["summary"]["amax_forward"]
    (chain,) = bound["chains"]
    assert [site["name"] for site in chain["sites"]] == ["pair.first", "pair.second"]
    assert chain["sites"][0]["mean"] != chain["sites"][1]["mean"]


def test_a_checkpoint_is_measured_as_it_is(stability, tmp_path):
    import torch
    from helpers.builders import Small, points

    import mhc_compile

    model = Small()
    mhc_compile.attach(model, points())
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.phi.normal_()
            connection.scale.fill_(1.0 / connection.scale_speed)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    done = stability("measured_models.py:small", "--weights", "trained.pt", "--json")
    assert done.exit_code == 0, done.output
    want = mhc_compile.stability(model, points())
    got = json.loads(done.stdout)
    assert got["summary"] == pytest.approx(want.summary())
    assert got["summary"]["distance"] > 0.01
    assert got["remarks"] == []


def test_unmeasurable_input_raises(stability, tmp_path):
    with pytest.warns(match="nothing was rewritten"):
        assert stability("measured_models.py:nothing").exit_code == 1
    done = stability("measured_models.py:small", "--mapping", "identity", "--random-logits", "1")
    assert (done.exit_code, "has no logits" in done.output) == (2, True)
    done = stability("measured_models.py:small", "--png", "no/where.png")
    assert (done.exit_code, "there is no directory" in done.output) == (2, True)
    assert stability("measured_models.py:small", "--full-size").exit_code == 2
