"""`mhc bench` on a device, from end to end: every row is measured or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers.gpu import needs_device

from mhc_compile.tools.bench.candidates import LIMIT, PLAIN

pytestmark = needs_device()


def test_every_row_is_measured_or_says_why_not(device, tmp_path):
    file = tmp_path / "bench.json"
    names = ("ours", "ours-deepseek-v4.1", "liger", LIMIT)
    command = [sys.executable, "-m", "mhc_compile", "bench", "--quick", "--device", device, "--processes", "2"]
    command += ["--dtype", "bfloat16", "--json", str(file), *(word for name in names for word in ("--only", name))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(file.read_text())
    assert [one["kind"] for one in result["benchmarks"]] == ["site", "step"]
    for benchmark in result["benchmarks"]:
        rows = {row["name"]: row for row in benchmark["rows"]}
        assert set(rows) == {PLAIN, *names}
        liger = rows.pop("liger")
        assert liger["status"] == "ok" or liger["message"].startswith(("not installed", "its kernels need"))
        assert {row["status"] for row in rows.values()} == {"ok"}
        for name, row in rows.items():
            assert row["seconds"]["total"]["median"] > 0
            assert row["ratio"]["total"]["median"] > 0
            if device == "cuda":
                assert row["host_seconds"] > 0
                assert bool(row["kernels"]) == (benchmark["kind"] == "site" and name != LIMIT)
    if device == "cuda":
        before, _ = result["conditions"]["gpu"]
        assert before["triton"] != "not installed"
