"""`mhc bench TARGET`: a user's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def make():
    return nn.Sequential(Block(), Block()), (torch.randn(4, 8),)
"""


def bench(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "mhc_compile", "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "models.py").write_text(MODEL)
    return tmp_path


@pytest.mark.slow
def test_plain_rewritten_and_eager_are_timed(folder):
    done = bench(folder, "models.py:make", "--quick", "--json", "-", "--inner-backend", "aot_eager", "--streams", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["schema"], result["model"], result["sites"]) == ("mhc-compile/bench-target/1", "Sequential", 2)
    rows = {row["name"]: row for row in result["benchmark"]["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(("plain", "ours", "eager"), "ok")
    assert all(len(row["samples"]["total"]) == 3 for row in rows.values())
    assert rows["plain"]["ratio"]["total"]["median"] == 1
    # phi [2 C, 8], 8 biases and 3 scales for each of two sites.
    assert rows["ours"]["parameters"] - rows["plain"]["parameters"] in {0, 2 * (2 * 8 * 8 + 8 + 3)}
    assert "timing" in done.stderr


@pytest.mark.slow
def test_eval_is_a_forward_alone(folder):
    done = bench(folder, "models.py:make", "--quick", "--eval", "--quiet", "--inner-backend", "eager")
    assert done.returncode == 0, done.stderr
    assert "Sequential, 2 sites; one forward pass; 3 rounds" in done.stdout
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models.py:make", "--width", "64"), "--width: of the benchmark without TARGET"),
        (("models.py:make", "--only", "liger"), "--only: of the benchmark without TARGET"),
        (("models.py:make", "--device", "cuda"), "--device cuda: this torch sees no CUDA device"),
        (("--streams", "2"), "streams: for a TARGET"),
        (("--eval",), "train: for a TARGET"),
        (("--weights", "w.safetensors"), "weights: for a TARGET"),
    ],
)
def test_flags_of_the_other_benchmark(folder, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = bench(folder, *arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
