"""`mhc scaling`: the sizes against published figures, the estimate against a whole model and
against counts by hand.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import mhc_compile
from mhc_compile.cli.scaling import command
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError
from mhc_compile.passes.transforms.recompute import block_length
from mhc_compile.reporting.progress import Silent
from mhc_compile.tools import scaling
from mhc_compile.tools.bench.measure import run
from mhc_compile.tools.bench.sites import Shape as Measured
from mhc_compile.tools.scaling.estimate import Decoder, estimate, kept_bytes, parameters
from mhc_compile.tools.scaling.report import markdown, view
from mhc_compile.tools.scaling.shapes import SHAPES, Shape

SMALL = Shape(
    name="small", layers=3, width=32, heads=4, head=8, hidden=24, active=2, experts=6, dense=1, vocabulary=50, tokens=16
)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mHC 3B", 2.97e9, 0.77e9),
        ("mHC 9B", 9.18e9, 1.9e9),
        ("mHC 27B", 27.0e9, 4.45e9),
        ("Llama 3.1 405B", 405e9, 405e9),
        ("DeepSeek-V3 671B", 671e9, 37e9),
    ],
)
def test_shapes_have_the_published_parameters(name: str, total: float, active: float) -> None:
    shape = next(shape for shape in SHAPES if shape.name == name)
    assert parameters(shape) == pytest.approx(total, rel=0.005)
    assert parameters(shape, active=True) == pytest.approx(active, rel=0.015)


QUERIES, KEYS = 32 * 4 * 8, 2 * 32 * 2 * 8
LATENT = 32 * (12 + 4) + 12 * 2 * 4 * 8  # to keys, values and positions, and up to 4 heads of both


@pytest.mark.parametrize(
    ("variant", "attention"),
    [
        ({}, 4 * QUERIES),
        ({"groups": 2}, 2 * QUERIES + KEYS),
        ({"latent": 12, "rotary": 4}, 32 * 4 * (8 + 4) + LATENT + QUERIES),
        ({"latent": 12, "rotary": 4, "query_latent": 10}, 32 * 10 + 10 * 4 * (8 + 4) + LATENT + QUERIES),
    ],
)
def test_parameters_counted_by_hand(variant: dict[str, int], attention: int) -> None:
    shape = replace(SMALL, **variant)
    expert, ends = 3 * 32 * 24, 2 * 50 * 32
    assert parameters(shape, active=True) == 3 * (attention + 2 * expert) + ends
    assert parameters(shape) == 3 * attention + (2 * 6 + 1 * 2) * expert + ends
    assert Decoder(shape, shape.layers)(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 50)


def test_estimate_equals_explain_of_the_whole_model() -> None:
    shape = replace(SMALL, layers=5)
    got = estimate(shape)
    model, ids = Decoder(shape, 5).to(torch.bfloat16), torch.zeros(1, 16, dtype=torch.int64)
    want = mhc_compile.explain(model, ids)
    assert (got.plain, got.added, got.floor) == (want.plain, want.added, want.floor)
    assert got.cost == want.cost
    assert got.cost.parameters == 10 * (4 * 32 * 24 + 24 + 3)
    assert [one.floor for one in got.overheads] == [one.floor for one in want.overheads]
    text = markdown([got])
    assert "| small | 5 | 32 | 16 |" in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(view([got]))
    assert f"{got.added.flops / got.plain.flops:.2%}" in console.export_text()


def test_kept_bytes_counted_by_hand() -> None:
    cheap = kept_bytes(8, 2, Options().resolved, 10, "cheap")
    small = (8 + 16 + 24 + 1 + 2) * 4
    assert cheap == (1 + 3 * 4) * 8 * 2 + 10 * small
    assert kept_bytes(8, 2, Options().resolved, 10, "cheap", "cpu") == (1 + 2 * 4) * 8 * 2 + 10 * small
    five = kept_bytes(8, 2, Options(streams=5).resolved, 10, "cheap")
    assert five == (1 + 9 * 5) * 8 * 2 + 10 * (10 + 25 + 35 + 1 + 2) * 4
    assert block_length(10, 4) == 3
    # Three of nine steps keep streams and coefficients, and so does the first read; six do not keep
    # what their branch reads.
    assert kept_bytes(8, 2, Options().resolved, 10, "block") == (1 + 3 * 4 - 6) * 8 * 2 + 4 * small


def test_impossible_shape_is_rejected() -> None:
    with pytest.raises(OptionError, match="layers is 0; expected a positive integer"):
        replace(SMALL, layers=0)
    with pytest.raises(OptionError, match="width 100 and 3 heads"):
        Shape.of(width=100, layers=2, heads=3)
    with pytest.raises(OptionError, match="4 heads do not share 3"):
        replace(SMALL, groups=3)
    with pytest.raises(OptionError, match="7 active experts of 6"):
        replace(SMALL, active=7)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhc_compile.tools.scaling.shapes.SHAPES", ())
    flags = ["--width", "64", "--layers", "2", "--vocabulary", "100", "--tokens", "8", "--quiet", "--streams", "2"]
    done = CliRunner().invoke(command, [*flags, "--json"], catch_exceptions=False)
    (yours,) = json.loads(done.stdout)["estimates"]
    assert (yours["shape"]["name"], yours["sites"], yours["shape"]["hidden"]) == ("yours", 4, 192)
    assert yours["cost"]["parameters"] == 4 * (2 * 64 * 8 + 8 + 3)
    for wrong in (["--width", "64"], ["--heads", "2"], ["--mapping", "sinkorn"]):
        done = CliRunner().invoke(command, wrong)
        assert done.exit_code == 2, wrong


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_command(regenerate: bool) -> None:
    page = Path(scaling.__file__).with_name("SCALING.md")
    text, tables = page.read_text(), markdown([estimate(shape) for shape in SHAPES])
    if regenerate:
        begin, end = text.index("**Sizes**"), text.index("\n\nSizes are from:")
        page.write_text(text[:begin] + tables + text[end:])
    assert f"\n\n{tables}\n\nSizes are from:\n\n" in page.read_text()
    assert [f"- {shape.name}: {shape.source}" for shape in SHAPES] == re.findall(
        "^- .*: .*", text.split("## ")[0], re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 8])
def test_predicted_memory_is_the_measured_one_to_a_tenth(layers: int) -> None:
    shape = Measured(width=128, layers=layers, tokens=256, vocabulary=64)
    result = run([shape], only=("ours", "ours-block"), kinds=("step",), rounds=1, cold=False, progress=Silent())
    plain, ours, block = (row.saved_bytes for row in result.benchmarks[0].rows)
    for row, recompute in ((ours, "cheap"), (block, "block")):
        predicted = kept_bytes(128, 4, Options().resolved, shape.sites, recompute, "cpu")
        assert row - plain == pytest.approx(256 * predicted, rel=0.1)
