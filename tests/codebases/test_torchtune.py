"""torchtune: `tune run full_finetune_single_device`, which compiles layer by layer."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from codebases.harness import (
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

pytestmark = [pytest.mark.slow, needs("torchtune", "torchao", apart="torchtune")]

MODEL = {"vocab_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 32}
CONFIG = {
    "output_dir": "out",
    "model": {"_component_": "torchtune.models.llama3.llama3", **MODEL, "intermediate_dim": 32},
    "tokenizer": {"_component_": "tune_parts.Tokenizer"},
    "dataset": {"_component_": "tune_parts.Tokens"},
    "seed": 0,
    "shuffle": False,
    "checkpointer": {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": "base",
        "checkpoint_files": ["model.pt"],
        "output_dir": "${output_dir}",
        "model_type": "LLAMA3",
    },
    "resume_from_checkpoint": False,
    "batch_size": 2,
    "epochs": 2,
    "max_steps_per_epoch": None,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
    "optimizer_in_bwd": False,
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "gradient_accumulation_steps": 1,
    "clip_grad_norm": 1.0,
    "compile": True,
    "device": "cpu",
    "dtype": "fp32",
    "enable_activation_checkpointing": False,
    "enable_activation_offloading": False,
    "metric_logger": {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": "${output_dir}",
        "filename": "log.txt",
    },
    "log_every_n_steps": 1,
    "log_peak_memory_stats": False,
}
RUN = ["-m", "torchtune._cli.tune", "run", "full_finetune_single_device", "--config", "config.yaml"]

MAKE = f"""
import torch
from torchtune.models.llama3 import llama3

def make():
    return llama3(**{CONFIG["model"]!r})
""".replace("'_component_': 'torchtune.models.llama3.llama3', ", "")
BASE = """
torch.manual_seed(0)
model = make()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.2)
torch.save(model.state_dict(), "base/model.pt")
"""


def losses(file) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss:([\d.]+)", file.read_text())]


#: The checkpointer of Hugging Face's layout, whose converter knows the names of the plain model.
HF = {
    "_component_": "torchtune.training.FullModelHFCheckpointer",
    "checkpoint_dir": "hf",
    "checkpoint_files": ["model.safetensors"],
    "output_dir": "${output_dir}",
    "model_type": "LLAMA3",
}
SAVE_HF = """
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf

state = tune_to_hf(torch.load("base/model.pt"), num_heads=2, num_kv_heads=2, dim=16)
save_file({name: value.contiguous() for name, value in state.items()}, "hf/model.safetensors")
"""


def test_the_layout_of_hugging_face(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    program = Program(tmp_path, "--replace-inductor", apart="torchtune")
    for folder in ("base", "hf"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16})
    )
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "checkpointer": HF}))
    (tmp_path / "base.py").write_text(MAKE + BASE + SAVE_HF)
    program.run("base.py", mhc=False)
    assert program.plan(*RUN, "output_dir=planned") == 4
    program.run(*RUN, "output_dir=whole", warns="it looks like one of the plain model")
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "whole")
    name = "model-00001-of-00001.safetensors"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    resume = ["resume_from_checkpoint=True", "checkpointer.checkpoint_dir=whole"]
    program.run(*RUN, "output_dir=resumed", *resume, f"checkpointer.checkpoint_files=[epoch_0/{name}]")
    early, whole, resumed = (
        safetensors.load_file(tmp_path / folder / name)
        for folder in ("whole/epoch_0", "whole/epoch_1", "resumed/epoch_1")
    )
    assert sites(resumed) == 4
    assert "model.layers.0.self_attn.q_proj.weight" in resumed
    assert_moved(early, resumed)
    assert_equal(whole, resumed)


def test_torchtune(tmp_path, regenerate):
    program = Program(tmp_path, "--replace-inductor", apart="torchtune")
    (tmp_path / "base").mkdir()
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
    (tmp_path / "base.py").write_text(MAKE + BASE)
    program.run("base.py", mhc=False)
    assert program.plan(*RUN, "output_dir=planned") == 4
    program.run(*RUN, "output_dir=whole", warns="it looks like one of the plain model")
    early, last = ("epoch_0/model-00001-of-00001.bin", "epoch_1/model-00001-of-00001.bin")
    resume = ["resume_from_checkpoint=True", "checkpointer.checkpoint_dir=whole"]
    uninterrupted = load(tmp_path / "whole" / last)
    before = losses(tmp_path / "whole" / "log.txt")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    program.run(*RUN, "output_dir=resumed", *resume, f"checkpointer.checkpoint_files=[{early}]")
    assert losses(tmp_path / "resumed" / "log.txt") == pytest.approx([*before, *before[2:]], abs=1e-5)
    saved = load(tmp_path / "resumed" / last)
    assert sites(saved) == 4
    assert_equal(uninterrupted, saved)
    assert_moved(load(tmp_path / "whole" / early), saved)
    recipe = load(tmp_path / "whole" / "recipe_state" / "recipe_state.pt")
    assert_each_in_one(saved, recipe["optimizer"])

    stir(saved)
    torch.save(saved, tmp_path / "last.pt")
    loss = "lambda model: loss_of(model, batch(1000)).item()"
    expected = program.reference(f"{MAKE}from blocks import batch, loss_of\nboth(make, torch.load('last.pt'), {loss})")
    (tmp_path / "evaluate.py").write_text(
        f"{MAKE}from blocks import batch, loss_of\nmodel = make().eval()\nmodel.load_state_dict(torch.load('last.pt'))\n"
        "print(f'loss {loss_of(model, batch(1000)).item():.7f}')\n"
    )
    done = program.run("evaluate.py")
    assert float(re.search(r"loss ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, abs=1e-5)
    Row(
        f"torchtune {version('torchtune', 'torchtune')}",
        "`mhc run --replace-inductor -m torchtune._cli.tune run full_finetune_single_device`, `resume_from_checkpoint`",
        trains="yes, 4 sites, layers compiled one by one",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes, never compiled",
        checkpoint="yes",
        notes="`FullModelTorchTuneCheckpointer` and `FullModelHFCheckpointer`",
    ).record(regenerate)
