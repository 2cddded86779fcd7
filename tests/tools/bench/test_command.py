"""`mhc bench` through its entry point."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from mhc_compile.cli.bench import command
from mhc_compile.tools.bench.results import Benchmark, Result, Row

CONDITIONS = {
    **dict.fromkeys(("device", "cores", "threads", "torch", "dtype", "layers", "vocabulary"), 1),
    **dict.fromkeys(("streams", "iterations", "wait_policy"), 1),
    "widths": [1],
    "tokens": [1],
    "load": (0.0, 0.0),
}


def bench(*arguments: str, imports: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-X", "importtime"] * imports), "-m", "mhc_compile", "bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        check=False,
    )


def test_help_does_not_import_torch():
    done = bench("--help", imports=True)
    assert done.returncode == 0
    assert "--rounds" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy", "rich", "matplotlib"} & imported


def test_unknown_name_is_wrong_usage():
    done = bench("--quick", "--only", "hyperconnections")
    assert done.returncode == 2
    assert "did you mean 'hyper-connections'" in done.stderr


@pytest.mark.slow
def test_plain_and_limit_from_end_to_end(tmp_path):
    data, chart = tmp_path / "out" / "bench.json", tmp_path / "out" / "bench.png"
    sizes = ("--width", "16", "--tokens", "16", "--vocabulary", "32", "--rounds", "2")
    done = bench("--quick", *sizes, "--only", "plain", "--only", "limit", "--json", str(data), "--png", str(chart))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(data.read_text())
    assert [benchmark["kind"] for benchmark in result["benchmarks"]] == ["site", "step"]
    for benchmark in result["benchmarks"]:
        assert [(row["name"], row["status"]) for row in benchmark["rows"]] == [("plain", "ok"), ("limit", "ok")]
        plain = benchmark["rows"][0]
        assert plain["counters"]["kernels"] >= 1
        assert plain["compile_seconds"] is None  # --quick reuses compiled code
    assert result["benchmarks"][0]["rows"][0]["counters"]["bytes"] == 3 * 16 * 16 * 4
    assert [result["conditions"][name] for name in ("widths", "layers", "rounds")] == [[16], 1, 2]
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "of the same rounds" in done.stdout
    assert "step: timing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "shapes", "processes", "seconds"),
    [
        ((), [(256, 4, 1024, "cpu", "float32")], 1, math.inf),
        (("--width", "8", "--width", "16", "--seconds", "9"), [(8, 4, 1024, "cpu", "float32"), (16, 4, 1024, "cpu", "float32")], 1, 9),
        (("--device", "cuda"), [(2560, 2, 4096, "cuda", "bfloat16"), (4096, 2, 4096, "cuda", "bfloat16")], 3, 540),
        (("--device", "cuda", "--quick", "--processes", "2", "--dtype", "float32"), [(64, 1, 128, "cuda", "float32")], 2, 540),
        (("--benchmark", "forward"), [(256, 6, tokens, "cpu", "float32") for tokens in (1, 16, 128)], 1, math.inf),
        (
            ("--benchmark", "forward", "--tokens", "2", "--tokens", "3", "--width", "8", "--width", "16"),
            [(width, 6, tokens, "cpu", "float32") for width in (8, 16) for tokens in (2, 3)], 1, math.inf,
        ),
        (("--device", "cuda", "--layers", "4", "--width", "512"), [(512, 4, 4096, "cuda", "bfloat16")], 3, 540),
    ],
)  # fmt: skip
def test_sizes_of_a_device(monkeypatch, arguments, shapes, processes, seconds):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mhc_compile.reporting.conditions.available_cores", lambda: 3)
    result = Result(CONDITIONS, (), False)
    monkeypatch.setattr(
        "mhc_compile.tools.bench.measure.run", lambda *args, **how: (seen.append((*args, how)), result)[1]
    )
    assert CliRunner().invoke(command, list(arguments)).exit_code == 0
    ((found, how),) = seen
    assert [(one.width, one.layers, one.tokens, one.device, one.dtype) for one in found] == shapes
    assert (how["processes"], how["seconds"]) == (processes, seconds)


def test_cuda_without_a_device_is_wrong_usage(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(command, ["--device", "cuda"])
    assert (done.exit_code, "sees no CUDA device" in done.output) == (2, True)


@pytest.mark.parametrize(
    ("flags", "expected", "found"),
    [
        ((), "expected --device cuda", "found --tune"),
        (("--device", "cuda", "--only", "ours"), "expected --device cuda", "found --device --only --tune"),
        (("--device", "cuda", "--tokens", "1", "--tokens", "2"), "2 --tokens", "a configuration is one for every T"),
    ],
)
def test_what_tuning_does_not_take_is_wrong_usage(monkeypatch, tmp_path, flags, expected, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = CliRunner().invoke(command, ["--tune", str(tmp_path / "configs.json"), *flags])
    assert done.exit_code == 2
    assert f"--tune: {expected}" in done.output
    assert found in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("interrupted", "code"), [(False, 1), (True, 130)])
def test_exit_codes_of_a_failed_candidate_and_an_interrupt(monkeypatch, tmp_path, interrupted, code):
    failed = Row(name="ours", title="ours", status="failed", message="RuntimeError: no")
    result = Result(CONDITIONS, (Benchmark("site", 1, (failed,)),), interrupted)
    monkeypatch.setattr("mhc_compile.tools.bench.measure.run", lambda shapes, **settings: result)
    done = CliRunner().invoke(command, ["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")])
    assert done.exit_code == code
    assert "ours: RuntimeError: no" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert (tmp_path / "b.png").exists()
