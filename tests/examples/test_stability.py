"""examples/stability: statistics against independent numbers, and all of it in miniature."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "examples" / "stability"
sys.path.insert(0, str(FOLDER))

from experiment.numbers import (  # noqa: E402
    diverged,
    mean_interval,
    median_interval,
    proportion_interval,
    spikes,
    surges,
)
from experiment.plan import ExperimentError, Plan, Run, read_json, write_json  # noqa: E402
from experiment.report import report  # noqa: E402

MINI = {"variants": ["plain", "mHC"], "rates": [0.001], "seeds": 2, "steps": 5, "layers": 2, "width": 16}
REST = {"batch": 2, "length": 16, "held_out": 4, "rounds": 7, "measured": 2, "inner": "eager"}
PLAN = Plan.from_json(json.dumps(MINI | REST))


def student_below(t: float, freedom: int) -> float:
    """Return the distribution function, from the density by Simpson's rule."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    width = t / 20_000
    values = [scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(20_001)]
    weights = [1] + [4, 2] * 9_999 + [4, 1]
    return 0.5 + width / 3 * sum(a * b for a, b in zip(weights, values, strict=True))


def test_the_interval_of_a_mean() -> None:
    known = mean_interval([1.0, 2.0, 3.0])
    assert (known.value, known.low) == (2.0, pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3))
    assert known.high - known.value == pytest.approx(known.value - known.low)
    for count in (2, 5, 12, 31):
        values = [0.0] * (count - 1) + [1.0]
        deviation = (1 / count) ** 0.5  # of one 1 among zeros, over sqrt(count - 1) degrees: sqrt(1 / count)
        quantile = (mean_interval(values).high - 1 / count) / (deviation / count**0.5)
        assert student_below(quantile, count - 1) == pytest.approx(0.975, abs=1e-4)
    assert mean_interval([4.0]).low == -math.inf


def test_the_interval_of_a_median() -> None:
    ten = median_interval([7.0, 1.0, 9.0, 3.0, 5.0, 2.0, 8.0, 4.0, 10.0, 6.0])
    assert (ten.low, ten.value, ten.high) == (2.0, 5.5, 9.0)  # 2 · P(B(10, ½) < 2) = 2.1 %, with < 3 it would be 10.9 %
    six = median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (six.low, six.high) == (1.0, 6.0)  # 3.1 %
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).high == math.inf  # even the extremes miss it with 6.25 %


def test_the_interval_of_a_share() -> None:
    none, all_of_them, some = proportion_interval(0, 5), proportion_interval(5, 5), proportion_interval(2, 5)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025**0.2))
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(0.025**0.2), 1.0)
    assert (some.low, some.high) == (pytest.approx(0.0527, abs=1e-4), pytest.approx(0.8534, abs=1e-4))


def test_initial_weights_fit_the_width() -> None:
    from experiment.training import build

    for width, weights in ((64, 1.0), (128, 1.0), (64, 0.16)):
        model = build(Plan(layers=8, width=width, weights=weights), seed=0)
        linear = weights / width**0.5
        expected = {"embed": 0.16, "positions": 0.02, "head": linear, "blocks.7.attention.qkv": linear}
        expected |= {
            "blocks.7.attention.out": linear / 4,
            "blocks.7.feedforward.rise": linear,
            "blocks.7.feedforward.fall": linear / 4,
        }
        for name, deviation in expected.items():
            assert model.get_submodule(name).weight.std().item() == pytest.approx(deviation, rel=0.05), name  # type: ignore[union-attr]
            assert abs(model.get_submodule(name).weight.mean().item()) < deviation / 20, name  # type: ignore[union-attr, operator]


def test_spikes() -> None:
    calm = [1.0] * 200
    assert spikes(calm) == []
    assert spikes([*calm[:49], 9.0, *calm]) == []  # nothing to compare with yet
    assert spikes([*calm, 3.0, *calm, 3.1, 1.0, math.inf]) == [401, 403]
    assert spikes([2.0**-i for i in range(100)]) == []


def test_surges_and_divergence() -> None:
    fall = [4 - i / 50 for i in range(100)]
    assert (surges(fall), diverged(fall, fall)) == (0, False)
    hill = [2.0] * 30 + [3.0] * 30 + [2.0] * 30
    assert (surges(hill), diverged(hill, hill)) == (1, False)
    assert (surges(hill + hill), diverged(hill[:60], hill)) == (2, True)
    assert diverged([*fall, math.nan], fall)
    assert diverged(fall, [1.0, math.inf])
    assert surges([2.0] * 40 + [11.0] + [2.0] * 40) == 0  # one step moves the mean of 20 by 0.45


def made_run(
    variant: str, rate: float, seed: int, final: float, plan: Plan, *, end: float | None = 1.0
) -> dict[str, Any]:
    steps = plan.steps
    return {
        "variant": variant, "rate": rate, "seed": seed, "settings": plan.deciding(variant), "start": 0.0, "parameters": 1,
        "loss": [*(5 - 3 * i / steps for i in range(steps - 1)), end], "norm": [1.0] * (steps - 1) + [end],
        "validation": [[steps, final]] if end else [], "gain": [[steps, 1.0, 1.0 + final, 0.1, 0.0]],
        "digest": "", "data": "d", "torch": "t", "seconds": 1.0,
    }  # fmt: skip


def test_report_claims_only_differences_outside_the_intervals(tmp_path: Path) -> None:
    """Made-up runs: HC is better in every seed, identity is a coin toss, mHC diverged once."""
    plan = Plan(variants=("plain", "HC", "mHC", "identity"), rates=(0.001,), seeds=3, steps=80)
    finals = {"plain": (2.0, 2.1, 2.2), "HC": (1.8, 1.91, 1.99), "identity": (2.1, 2.0, 2.2), "mHC": (2.0, 2.1, 2.2)}
    for variant, values in finals.items():
        for seed, value in enumerate(values):
            end = None if (variant, seed) == ("mHC", 1) else 1.0
            content = made_run(variant, 0.001, seed, value, plan, end=end)
            write_json(tmp_path / "runs" / f"{variant}-0.001-{seed}.json", content)
    report(plan, tmp_path)
    figures = read_json(tmp_path / "summary.json")["rates"]["0.001"]
    gap = figures["HC"]["difference"]
    assert gap["values"] == pytest.approx([-0.2, -0.19, -0.21])
    assert (gap["low"], gap["high"]) == (pytest.approx(-0.2248, abs=1e-4), pytest.approx(-0.1752, abs=1e-4))
    assert figures["mHC"]["difference"]["seeds"] == [0, 2]
    mean = (2.8 * 2.91 * 2.99) ** (1 / 3)  # of products the geometric one
    assert figures["HC"]["gain"]["backward"][-1][:2] == [80, pytest.approx(mean, abs=1e-4)]
    assert figures["HC"]["largest"] == [1.0, pytest.approx(2.99)]
    assert figures["mHC"]["more_spikes"]["values"] == [0, 1, 0]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "HC is lower by 0.200 [-0.225, -0.175], lower in 3 of 3 seeds" in text
    assert "Not distinguishable from plain at 3 seeds, lr 0.001: mHC +0.000" in text
    assert "Diverged, lr 0.001: mHC 1 of 3; no run of the others." in text
    assert "Surges of the loss, lr 0.001: none in any run." in text
    assert "| HC (unconstrained), the paper's speeds, a = 0.3 | 1.9000 [" in text
    assert "12 of 12 runs" in text
    (tmp_path / "runs" / "HC-0.001-0.json").unlink()
    write_json(tmp_path / "again.json", {"plain-0.001-1": True, "HC-0.001-1": False})
    report(plan, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "the same bit for bit: plain-0.001-1." in text
    assert "NOT the same: HC-0.001-1." in text
    assert "11 of 12 runs" in text
    assert "Not all runs are finished" in text


def test_the_report_needs_no_run_but_the_same_settings(tmp_path: Path) -> None:
    """The summary alone gives the page that is in git, byte for byte."""
    names = [name for name in ("summary.json", "cost.json") if (FOLDER / "results" / name).exists()]
    for name in names:
        (tmp_path / name).write_bytes((FOLDER / "results" / name).read_bytes())
    written = [path.name for path in report(Plan(), tmp_path)]
    assert set(written) == {path.name for path in (FOLDER / "results").iterdir() if path.is_file()} - {
        "cost.json",
        "again.json",
    }
    for name in ("summary.json", "RESULTS.md"):
        assert (tmp_path / name).read_bytes() == (FOLDER / "results" / name).read_bytes()
    with pytest.raises(ExperimentError, match=r"summary\.json was made with seeds 8, not 4"):
        report(Plan(seeds=4), tmp_path)
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(ExperimentError, match="no run of this plan is finished"):
        report(Plan(), tmp_path)


def test_runs_of_other_settings_are_rejected(tmp_path: Path) -> None:
    write_json(tmp_path / "runs" / "plain-0.001-0.json", made_run("plain", 0.001, 0, 2.0, PLAN))
    longer = Plan.from_json(json.dumps(MINI | REST | {"steps": 6}))
    with pytest.raises(ExperimentError, match="was made with steps 5, not 6"):
        report(longer, tmp_path)
    then = made_run("mHC", 0.001, 0, 2.0, PLAN)
    path = tmp_path / "runs" / "mHC-0.001-0.json"
    write_json(path, then | {"settings": then["settings"] | {"init_gain": 0.3}})  # a default of another version
    with pytest.raises(ExperimentError, match=r"mHC-0\.001-0\.json was made with init_gain 0\.3, not 0\.01"):
        report(PLAN, tmp_path)
    write_json(path, then)
    PLAN.compare_data(tmp_path, "d")
    with pytest.raises(ExperimentError, match=r"another Python \(digest d, here other\)"):
        PLAN.compare_data(tmp_path, "other")
    with pytest.raises(ExperimentError, match="variant 'HCC' is unknown; known: permutations, HC"):
        Plan(variants=("HCC",))
    with pytest.raises(ExperimentError, match=r"learning rate -0\.1 is not a positive number"):
        Plan(rates=(-0.1,))


def test_a_run_that_was_cut_goes_on_and_the_plain_part_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiment import training

    monkeypatch.setattr(training, "KEPT", 2)
    plan = replace(PLAN, variants=("plain", "attached"), steps=6, warm_up=1)
    part = tmp_path / "attached.part"
    plain = training.Subject(plan, "plain").train(Run("plain", 0.001, 0))
    subject, run = training.Subject(plan, "attached"), Run("attached", 0.001, 0)
    whole = subject.train(run)
    assert whole["loss"][:4] == plain["loss"][:4]  # the fourth is that of the plain model with hyper-connections
    assert whole["loss"][4] != plain["loss"][4]
    assert whole["parameters"] > plain["parameters"]
    for cut in (3, 5):
        seen: list[float] = []

        def interrupt(loss: float, seen: list[float] = seen, cut: int = cut) -> None:
            seen.append(loss)
            if len(seen) == cut:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            subject.train(run, interrupt, part=part)
        rest: list[float] = []
        assert subject.train(run, rest.append, part=part)["digest"] == whole["digest"]
        assert len(rest) == 6 - cut + 1
        assert part.exists()
        part.unlink()


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    flags = []
    for name, value in (MINI | REST).items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--out", str(folder), *flags, *more],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path: Path) -> None:
    """Finished runs are kept; a run that follows another equals one in its own process."""
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs" in done.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert sorted(files) == ["mHC-0.001-0.json", "mHC-0.001-1.json", "plain-0.001-0.json", "plain-0.001-1.json"]
    first = {name: json.loads(text) for name, text in files.items()}
    assert first["mHC-0.001-1.json"]["loss"][0] == pytest.approx(first["plain-0.001-1.json"]["loss"][0], abs=1e-5)
    assert first["mHC-0.001-1.json"]["parameters"] > first["plain-0.001-1.json"]["parameters"]
    assert first["mHC-0.001-1.json"]["gain"][-1][3] > 0  # the streams have separated
    assert first["mHC-0.001-0.json"]["loss"][0] != first["mHC-0.001-1.json"]["loss"][0]
    assert [point[0] for point in first["mHC-0.001-0.json"]["gain"]] == [2, 5]
    cost = (tmp_path / "cost.json").read_text()
    (tmp_path / "runs" / "mHC-0.001-1.json").unlink()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    again = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert json.loads(again.pop("mHC-0.001-1.json"))["digest"] == first["mHC-0.001-1.json"]["digest"]
    del files["mHC-0.001-1.json"]
    assert again == files
    assert (tmp_path / "cost.json").read_text() == cost
    for name in ("loss.png", "difference.png", "norm.png", "gain.png", "cost.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    summary = read_json(tmp_path / "summary.json")
    assert summary["cost"]["variants"]["mHC"]["ratio"]["value"] > 1
    assert "4 of 4 runs" in (tmp_path / "RESULTS.md").read_text()
    done = run(tmp_path, "--again", "plain-0.001-1")
    assert "the same, bit for bit" in done.stderr
    assert read_json(tmp_path / "again.json") == {"plain-0.001-1": True}
    content = first["plain-0.001-1.json"] | {"digest": "of another run"}
    write_json(tmp_path / "runs" / "plain-0.001-1.json", content)
    done = run(tmp_path, "--again", "plain-0.001-1")
    assert (done.returncode, "NOT the same" in done.stderr) == (1, True)
