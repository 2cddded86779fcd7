"""`mhc doctor`: what is broken on purpose is found, and the way out is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config

from mhc_compile.tools.doctor.check_result import run_checks
from mhc_compile.tools.doctor.environment import CHECKS
from mhc_compile.tools.doctor.smoke_test import smoke_test


def result(name, check=None):
    (result,) = run_checks({name: check or CHECKS[name]}).findings
    return result


def doctor(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mhc_compile", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **environment},
        check=False,
    )


def test_a_machine_that_works():
    done = doctor("--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["ok"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert set(findings) <= set(CHECKS)
    assert set(findings) >= {
        "environment",
        "Python",
        "torch",
        "torch internals",
        "C++ compiler",
        "GPU",
        "compile cache",
    }
    assert findings["tiny compile"]["status"] == "ok"
    assert findings["tiny compile"]["found"].startswith("2 sites, ")


@pytest.mark.slow
def test_compiling_switched_off_is_found_twice():
    done = doctor(TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 1
    assert "✗ TORCHDYNAMO_DISABLE" in done.stdout
    assert "Unset TORCHDYNAMO_DISABLE." in done.stdout
    assert "✗ tiny compile" in done.stdout
    assert "0 sites" in done.stdout
    assert "Compiling with mhc will fail here." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_no_compiler(tmp_path):
    finding = compiler(tmp_path / "no-such-compiler")
    assert finding.status == "failed"
    assert "set CXX to one that works" in finding.advice


def compiler(path):
    """Inductor reads CXX when it is imported."""
    with torch._inductor.config.patch({"cpp.cxx": (str(path),)}):
        return result("C++ compiler")


def test_a_compiler_that_does_not_compile(tmp_path):
    script = tmp_path / "broken++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo broken++ 1.0; exit 0; }\necho "no headers here" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    finding = compiler(script)
    assert finding.status == "failed"
    assert "no headers here" in finding.found


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(file / "cache"))
    finding = result("compile cache")
    assert finding.status == "failed"
    assert "TORCHINDUCTOR_CACHE_DIR" in finding.advice


@pytest.mark.parametrize(
    ("values", "words"), [([], "no entry point"), (["other.package:mhc"], "belongs to other.package:mhc")]
)
def test_the_entry_point(monkeypatch, values, words):
    import importlib.metadata as metadata

    points = [metadata.EntryPoint("mhc", value, "torch_dynamo_backends") for value in values]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
    finding = result('backend="mhc"')
    assert finding.status == "failed"
    assert words in finding.found
    assert "mhc_compile.mhc" in finding.advice


def test_versions(monkeypatch):
    assert result("torch").status == "ok"
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    old = result("torch")
    assert (old.status, old.advice) == ("failed", "Install torch 2.11 or newer.")
    monkeypatch.setattr(torch, "__version__", "3.1.0+cu140")
    assert result("torch").status == "warning"


def test_a_file_of_configurations_is_shown(monkeypatch):
    monkeypatch.setenv("MHC_TRITON_CONFIGS", "h200.json")
    assert "MHC_TRITON_CONFIGS=h200.json" in result("environment").found


def test_a_compile_that_hangs_is_ended():
    finding = result("tiny compile", lambda: smoke_test(seconds=0.1))
    assert finding.status == "failed"
    assert "not done after" in finding.found


def test_a_check_that_breaks_has_failed():
    def broken():
        raise RuntimeError("no such luck")

    report = run_checks({"broken": broken, "Python": CHECKS["Python"]})
    assert not report.ok
    assert [finding.status for finding in report.findings] == ["failed", "ok"]
    assert report.findings[0].found == "RuntimeError: no such luck"
