"""nanoGPT: build or resume, optimizer, torch.compile; sample in a second process."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
import torch
from codebases.harness import (
    SCRIPTS,
    Program,
    Row,
    assert_each_in_one,
    assert_equal,
    assert_moved,
    load,
    needs,
    sites,
    stir,
    stripped,
)

pytestmark = [pytest.mark.slow, needs("torch")]

FOLDER = SCRIPTS / "nanogpt"
TRAIN, SAMPLE = str(FOLDER / "train.py"), str(FOLDER / "sample.py")

REFERENCE = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt")
"""


@pytest.fixture
def program(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):  # one window: batches do not depend on the generator, which is not resumed
        generator.integers(0, 32, 17).astype(np.uint16).tofile(tmp_path / "data" / f"{split}.bin")
    return Program(tmp_path)


def losses(output: str) -> dict[str, float]:
    return {step: float(loss) for step, loss in re.findall(r"(iter \d+): loss ([\d.]+)", output)}


def test_nanogpt(program, regenerate):
    out = program.folder / "out"
    assert program.plan(TRAIN) == 4
    whole = losses(program.run(TRAIN, "--out_dir=whole").stdout)
    program.kill("iter 4", TRAIN)
    early = load(out / "ckpt.pt")
    resumed = losses(program.run(TRAIN, "--init_from=resume").stdout)
    assert len(resumed) == 4
    assert all(abs(resumed[step] - whole[step]) < 1e-5 for step in resumed)
    saved, uninterrupted = load(out / "ckpt.pt"), load(program.folder / "whole" / "ckpt.pt")
    assert early["iter_num"] == 3
    assert sites(saved["model"]) == 4
    assert_equal(saved["model"], uninterrupted["model"])
    assert_moved(early["model"], saved["model"])
    parameters = stripped(saved["model"])
    del parameters["lm_head.weight"]  # tied
    assert_each_in_one(parameters, saved["optimizer"])

    stir(saved["model"], weights=0.2)
    torch.save(saved, out / "ckpt.pt")
    tokens = program.reference(
        f"{REFERENCE}both(lambda: GPT(GPTConfig(**saved['model_args'])), saved['model'],"
        " lambda model: model.generate(torch.tensor([[3]]), 12, top_k=1)[0].tolist())"
    )
    for flag in ("--compile=False", "--compile=True"):
        assert ast.literal_eval(program.run(SAMPLE, flag).stdout.splitlines()[0]) == tokens
    Row(
        "nanoGPT's order",
        "`train.py`, `train.py --init_from=resume`, `sample.py`",
        trains="yes, 4 sites",
        in_optimizer="yes, in the groups by dimension",
        resumes="yes, killed",
        evaluates="yes, compiled or not",
        checkpoint="yes",
        notes="own script",
    ).record(regenerate)
