"""Output of `mhc explain` in a narrow and a wide terminal, as reviewed; `--regenerate` writes the
snapshots.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.builders import LAYERS, Decoder, tokens

from mhc_compile.cli import _group, main

SNAPSHOTS = Path(__file__).parent / "snapshots"
SLOW = pytest.mark.slow


@pytest.fixture
def mhc(monkeypatch):
    def run(*arguments, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        return CliRunner().invoke(_group, ["explain", *arguments])

    return run


def shown(output):
    """Return `output` without trailing spaces and line numbers, which change with every edit."""
    text = "\n".join(line.rstrip() for line in output.splitlines()) + "\n"
    return re.sub(r"(\w+\.py):\d+", r"\1:N", text)


def compare(text, name, request):
    file = SNAPSHOTS / f"{name}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(text)
    assert file.exists(), f"no snapshot {name}; write it with pytest --regenerate"
    assert text == file.read_text()


@pytest.mark.parametrize(
    ("family", "width"),
    [
        ("resnet", 80),
        ("resnet", 140),
        pytest.param("gpt2", 80, marks=SLOW),
        pytest.param("gpt2", 140, marks=SLOW),
        pytest.param("informer", 80, marks=SLOW),
        pytest.param("informer", 140, marks=SLOW),
    ],
)
def test_the_report_is_the_reviewed_one(mhc, family, width, request):
    done = mhc(f"zoo:{family}", width=width)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= width
    compare(shown(done.stdout), f"explain-{family}-{width}", request)


@pytest.mark.parametrize("width", [80, pytest.param(140, marks=SLOW)])
def test_the_details_are_the_reviewed_ones(mhc, width, request):
    site = mhc("zoo:resnet", "--why", "stages.1", width=width)
    rejection = mhc("zoo:resnet", "--why", "stages.2", width=width)
    assert (site.exit_code, rejection.exit_code) == (0, 0)
    compare(shown(site.stdout + "\n" + rejection.stdout), f"why-resnet-{width}", request)


@SLOW
def test_a_source_line_is_never_cut(mhc):
    for width in (40, 80, 140):
        text = mhc("zoo:gpt2", "--all", width=width).stdout
        assert (
            len(re.findall(r"(?:modeling_gpt2|activations)\.py:\d+", text)) == 2 + 3
        )  # sites of one block, rejections
        assert max(map(len, text.splitlines())) <= width


def test_json_of_details_and_of_the_overhead(mhc):
    found = json.loads(mhc("zoo:resnet", "--why", "stages.2", "--json").stdout)
    assert found["rejections"][0]["reason"] == "projected-skip"
    overheads = json.loads(mhc("zoo:resnet", "--json").stdout)["overheads"]
    assert {"NVIDIA H100 SXM"} < {overhead["machine"]["name"] for overhead in overheads}
    assert all(overhead["here"] > 0 for overhead in overheads)


def test_how_far_a_training_moves_the_gates(mhc):
    short = mhc("zoo:resnet", "--lr", "1e-4", "--steps", "100")
    assert (short.exit_code, "the gates may stay near their start" in short.stdout.replace("\n", " ")) == (0, True)
    long = mhc("zoo:resnet", "--lr", "1e-3", "--steps", "2000", width=100)
    assert "near their start" not in long.stdout
    assert "can move by 64 through bias and by " in long.stdout
    assert "Σ lr" not in mhc("zoo:resnet").stdout
    found = json.loads(mhc("zoo:resnet", "--lr", "1e-3", "--steps", "1000", "--streams", "2", "--json").stdout)
    widths = {chain["width"] for graph in found["graphs"] for chain in graph["chains"]}
    reach = min(0.8 * 0.01 * 2 * width for width in widths)
    assert found["training"] == {"total": 1.0, "static": 32.0, "token": pytest.approx(reach), "enough": True}
    static = mhc("zoo:resnet", "--lr", "1e-3", "--steps", "1000", "--no-token-dependent", "--json").stdout
    assert json.loads(static)["training"] == {"total": 1.0, "static": 32.0, "token": 0.0, "enough": True}
    alone = mhc("zoo:resnet", "--lr", "1e-3")
    assert (alone.exit_code, "--lr and --steps go together" in alone.stderr) == (2, True)


def test_an_exported_program(mhc, tmp_path):
    file = tmp_path / "decoder.pt2"
    torch.export.save(torch.export.export(Decoder(), (tokens(),)), file)
    report = mhc(str(file))
    assert report.exit_code == 0, report.stderr
    assert f"Decoder: {2 * LAYERS} residual adds rewritten, 0 additions skipped\n1 graph, 1 chain;" in report.stdout
    assert "x + attn(x)  builders.py:" in report.stdout
    found = json.loads(mhc(str(file), "--why", "blocks.1.mhc.mlp", "--json").stdout)
    assert [site["declaring_module"] for site in found["sites"]] == ["blocks.1.mlp"]


def test_an_unknown_name_is_one_readable_paragraph(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mhc", "explain", "zoo:resnet", "--why", "stage.2"])
    with pytest.raises(SystemExit) as end:
        main()
    output = capsys.readouterr()
    assert (end.value.code, output.out) == (2, "")
    assert "no addition is called 'stage.2'" in output.err
    assert "near names: stages.2" in output.err
