"""Frameworks that own the loop, the checkpoint or the adapters: accelerate, Lightning, peft."""

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
    version,
)

pytestmark = [pytest.mark.slow]

REFERENCE = """
from blocks import GPT, batch, loss_of
both(GPT, torch.load("last.pt"), lambda model: float(loss_of(model, batch(1000))))
"""


def losses(output: str) -> dict[str, float]:
    return {step: float(loss) for step, loss in re.findall(r"(step \d+): loss ([\d.]+)", output)}


def evaluated(output: str) -> float:
    return float(re.search(r"^loss ([\d.]+)", output, re.MULTILINE)[1])


@needs("accelerate")
@pytest.mark.parametrize(
    ("backend", "flags"), [(["--dynamo-backend", "mhc"], []), ([], ["--replace-inductor"])], ids=["named", "default"]
)
def test_accelerate(tmp_path, backend, flags, regenerate):
    safetensors = pytest.importorskip("safetensors.torch")
    script, program = [str(SCRIPTS / "accelerate_loop.py"), *backend], Program(tmp_path, *flags)
    assert program.plan(*script) == 4
    whole = losses(program.run(*script, "--out", "whole").stdout)
    resumed = losses(program.run(*script, "--out", "resumed", "--resume", "whole_3").stdout)
    assert len(resumed) == 3
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)
    early, uninterrupted, saved = (
        safetensors.load_file(tmp_path / folder / "model.safetensors") for folder in ("whole_3", "whole_6", "resumed_6")
    )
    assert sites(saved) == 4
    assert_equal(uninterrupted, saved)
    assert_moved(early, saved)
    assert_each_in_one(saved, load(tmp_path / "resumed_6" / "optimizer.bin"))
    stir(saved)
    torch.save(saved, tmp_path / "last.pt")
    safetensors.save_file(saved, tmp_path / "resumed_6" / "model.safetensors", metadata={"format": "pt"})
    done = program.run(*script, "--resume", "resumed_6", "--evaluate")
    assert evaluated(done.stdout) == pytest.approx(program.reference(REFERENCE), abs=1e-5)
    Row(
        f"accelerate {version('accelerate')}",
        f"`{' '.join(['mhc run', *flags])} accelerate_loop.py{''.join(f' {word}' for word in backend)}`, `load_state`",
        trains="yes, 4 sites",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes",
        checkpoint="yes, `save_state`",
        notes="own script, with accumulation",
    ).record(regenerate)


@needs("lightning")
def test_lightning(tmp_path, regenerate):
    script, program = str(SCRIPTS / "lightning_fit.py"), Program(tmp_path)
    assert program.plan(script) == 4
    whole = losses(program.run(script, "--out", "whole").stdout)
    resumed = losses(program.run(script, "--out", "resumed", "--resume", "whole/step=3.ckpt").stdout)
    assert len(resumed) == 3
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)
    files = ("whole/step=3.ckpt", "whole/step=6.ckpt", "resumed/step=6.ckpt")
    early, uninterrupted, saved = (load(tmp_path / file) for file in files)
    assert sites(saved["state_dict"]) == 4
    assert_equal(uninterrupted["state_dict"], saved["state_dict"])
    assert_moved(early["state_dict"], saved["state_dict"])
    assert_each_in_one(saved["state_dict"], *saved["optimizer_states"])
    stir(saved["state_dict"])
    torch.save(saved, tmp_path / "last.ckpt")
    torch.save(
        {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}, tmp_path / "last.pt"
    )
    done = program.run(script, "--resume", "last.ckpt", "--evaluate")
    assert evaluated(done.stdout) == pytest.approx(program.reference(REFERENCE), abs=1e-5)
    Row(
        f"Lightning {version('lightning')}",
        "`lightning_fit.py`: `fit`, `fit(ckpt_path=...)`, `validate(ckpt_path=...)`",
        trains="yes, 4 sites",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes",
        checkpoint="yes",
        notes="own script",
    ).record(regenerate)


LORA_REFERENCE = """
import mhc_compile
from blocks import batch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
tokens, losses = batch(1000), []
state = load_file("resumed/adapter_model.safetensors")
for streams in (False, True):
    model = AutoModelForCausalLM.from_pretrained("base")
    if streams:
        mhc_compile.restore(model, {k.removeprefix("base_model.model."): v for k, v in state.items() if ".mhc." in k})
    model = PeftModel.from_pretrained(model, "resumed").eval()
    with torch.no_grad():
        run = mhc_compile.eager(model) if streams else mhc_compile.plain(model)
        losses.append(float(run(input_ids=tokens, labels=tokens).loss))
print(losses)
"""


@needs("peft", "transformers")
def test_lora(tmp_path, regenerate):
    safetensors = pytest.importorskip("safetensors.torch")
    script, program = str(SCRIPTS / "lora.py"), Program(tmp_path, "--replace-inductor")
    program.run(script, "--pretrain", mhc=False)
    assert program.plan(script) == 4
    program.run(script, "--out", "whole")
    program.run(script, "--out", "resumed", "--resume", "whole/checkpoint-3")
    early, uninterrupted, saved = (
        safetensors.load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("whole/checkpoint-3", "whole", "resumed")
    )
    assert sites(saved) == 4
    assert_equal(uninterrupted, saved)
    assert_moved(early, saved)
    assert_each_in_one(saved, load(tmp_path / "resumed" / "checkpoint-6" / "optimizer.pt"))
    stir(saved)
    safetensors.save_file(saved, tmp_path / "resumed" / "adapter_model.safetensors", metadata={"format": "pt"})
    done = program.run(script, "--out", "resumed", "--evaluate")
    assert evaluated(done.stdout) == pytest.approx(program.reference(LORA_REFERENCE), abs=1e-5)
    Row(
        f"peft {version('peft')}",
        "`mhc run --replace-inductor lora.py`, `save_pretrained`, `PeftModel.from_pretrained`",
        trains="yes, 4 sites",
        in_optimizer="yes, with the adapter",
        resumes="yes",
        evaluates="yes",
        checkpoint="yes, in the adapter",
        notes="own script",
    ).record(regenerate)
