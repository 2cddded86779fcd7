"""Own scripts in the order of public ones: Muon, an average of weights, a GAN, DDP."""

from __future__ import annotations

import re

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
)

pytestmark = [pytest.mark.slow, needs("torch")]

#: Sites of each script, and what its optimizers are.
ORDERS = {
    "speedrun": (4, "Muon for the blocks' matrices, AdamW by name"),
    "nanochat": (6, "Muon over stacks of one shape, AdamW"),
    "ema": (4, "AdamW"),
    "gan": (5, "one Adam for each model"),
}

REFERENCE = """
import runpy, sys
from mhc_compile import connections, eager
script, state = {script!r}, torch.load("last.pt")[{key!r}]
sys.argv = [script, "--steps", "0"]
names = runpy.run_path(script)

def make():
    torch.manual_seed(0)
    if script.endswith("gan.py"):
        return torch.nn.ModuleDict(dict(generator=names["Generator"](), discriminator=names["Discriminator"]()))
    return names["GPT"]()

def evaluate(model):
    if script.endswith("gan.py"):
        generator, discriminator = (eager(part) if connections(part) else part for part in model.values())
        return float(discriminator(generator(names["draw"](1000, 4, 4))).square().mean())
    return float(names["loss_of"](model, names["batch"](1000)))

both(make, state, evaluate)
"""


def losses(output: str) -> dict[str, float]:
    return {step: float(loss) for step, loss in re.findall(r"(step \d+): loss ([\d.]+)", output)}


@pytest.mark.parametrize("name", ORDERS)
def test_order(tmp_path, name, regenerate):
    count, optimizers = ORDERS[name]
    script, program = str(SCRIPTS / f"{name}.py"), Program(tmp_path)
    assert program.plan(script) == count
    whole = losses(program.run(script, "--out", "whole").stdout)
    program.run(script, "--steps", "3", "--out", "stopped")
    resumed = losses(program.run(script, "--resume", "stopped_3.pt", "--out", "resumed").stdout)
    assert len(resumed) == 3
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)
    early, uninterrupted, saved = (load(tmp_path / f"{file}.pt") for file in ("stopped_3", "whole_6", "resumed_6"))
    models = [key for key in ("model", "average") if key in saved]
    for key in models:
        assert sites(saved[key]) == count
        assert_equal(uninterrupted[key], saved[key])
        assert_moved(early[key], saved[key])
    if name == "nanochat":  # the first matrix of a stack holds its state
        held = [index for group in saved["optimizers"][0]["param_groups"] for index in group["params"]]
        assert len(held) == len(set(held)) == len(saved["model"])
    else:
        assert_each_in_one(saved["model"], *saved["optimizers"])

    for key in models:
        stir(saved[key])
    torch.save(saved, tmp_path / "last.pt")
    expected = program.reference(REFERENCE.format(script=script, key=models[-1]))
    done = program.run(script, "--evaluate", "--resume", "last.pt")
    assert float(re.search(r"loss ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, abs=1e-5)
    Row(
        f"{name}'s order",
        f"`{name}.py`, `--resume`, `--evaluate`",
        trains=f"yes, {count} sites",
        in_optimizer=f"yes: {optimizers}",
        resumes="yes",
        evaluates="yes, never compiled" + (", the average" if name == "ema" else ""),
        checkpoint="yes",
        notes="own script",
    ).record(regenerate)


@pytest.mark.parametrize("order", ["ddp-compile", "compile-ddp"])
def test_ddp(tmp_path, order, regenerate):
    script, program = str(SCRIPTS / "ddp.py"), Program(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "--order", order]
    assert program.plan(script) == 4
    alone = losses(program.run(script, "--out", "alone").stdout)
    whole = losses(program.run(*torchrun, "--out", "whole").stdout)
    assert len(alone) == 6
    assert whole == pytest.approx(alone, abs=1e-5)
    resumed = losses(program.run(*torchrun, "--resume", "whole_3.pt", "--out", "resumed").stdout)
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)
    early, one, saved = (load(tmp_path / f"{file}.pt") for file in ("whole_3", "alone_6", "resumed_6"))
    assert sites(saved["model"]) == 4
    assert_equal(one["model"], saved["model"], tolerance=1e-4)
    assert_moved(early["model"], saved["model"])
    assert_each_in_one(saved["model"], *saved["optimizers"])

    stir(saved["model"])
    torch.save(saved, tmp_path / "last.pt")
    expected = program.reference(REFERENCE.format(script=script, key="model"))
    done = program.run(script, "--evaluate", "--resume", "last.pt")
    assert float(re.search(r"loss ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, abs=1e-5)
    wrapped = "DDP(compile(model))" if order == "ddp-compile" else "compile(DDP(model))"
    Row(
        f"`{wrapped}`",
        "`-m torch.distributed.run --nproc-per-node 2 ddp.py`, `--resume`, `--evaluate`",
        trains="yes, 4 sites, as one process does",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes, never compiled",
        checkpoint="yes",
        notes="own script, gloo, with `no_sync`",
    ).record(regenerate)
