"""litgpt's `pretrain`, `convert_pretrained_checkpoint` and `generate`."""

from __future__ import annotations

import json
import re

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
    stripped,
    version,
)

pytestmark = [pytest.mark.slow, needs("litgpt")]

CONFIG = {
    "model_name": "pythia-14m",
    "model_config": {
        "name": "pythia-14m",
        "parallel_residual": False,
        "block_size": 16,
        "vocab_size": 64,
        "padded_vocab_size": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "intermediate_size": 32,
    },
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
    "data": "tokens.Tokens",
    "train": {
        "max_tokens": 512,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "save_interval": 2,
        "log_interval": 1,
        "lr_warmup_steps": 0,
        "max_seq_length": 16,
        "max_norm": 1.0,
        "epochs": None,
    },
    "logger_name": "csv",
    "devices": 1,
    "tokenizer_dir": "tokenizer",
}
PRETRAIN = ["-m", "litgpt", "pretrain", "--config", "config.json"]
CONVERT = ["-m", "litgpt", "convert_pretrained_checkpoint"]
GENERATE = ["-m", "litgpt", "generate", "converted", "--prompt", "w3 w4", "--max_new_tokens", "12", "--top_k", "1"]

REFERENCE = """
from litgpt import GPT, Config

def evaluate(model):
    tokens = torch.tensor([[3, 4]])
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[0].tolist()

both(lambda: GPT(Config.from_file("converted/model_config.yaml")), torch.load("converted/lit_model.pth"), evaluate)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model = {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(64)}, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "w63"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Program(tmp_path)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss train: ([\d.]+)", output)]


def test_litgpt(program, regenerate):
    assert program.plan(*PRETRAIN, "--out_dir", "planned") == 4
    whole = program.run(*PRETRAIN, "--out_dir", "whole")
    early = "whole/step-00000002/lit_model.pth"
    resumed = program.run(*PRETRAIN, "--out_dir", "resumed", "--resume", early)
    assert losses(resumed.stdout) == pytest.approx(losses(whole.stdout)[-2:])
    start, uninterrupted, saved = (
        load(program.folder / file) for file in (early, "whole/final/lit_model.pth", "resumed/final/lit_model.pth")
    )
    assert sites(saved["model"]) == 4
    assert_equal(uninterrupted["model"], saved["model"])
    assert_moved(start["model"], saved["model"])
    assert_each_in_one(stripped(saved["model"]), saved["optimizer"])

    stir(saved["model"], weights=0.5)
    torch.save(saved, program.folder / "resumed" / "final" / "lit_model.pth")
    program.run(*CONVERT, "resumed/final", "converted")
    assert sites(load(program.folder / "converted" / "lit_model.pth")) == 4
    tokens = [f"w{token}" for token in program.reference(REFERENCE)]
    for flags in ([], ["--compile", "true"]):
        assert (
            " ".join(tokens) in program.run(*GENERATE, *flags, warns="mode='reduce-overhead') is for Inductor").stdout
        )
    Row(
        f"litgpt {version('litgpt')}",
        "`pretrain`, `pretrain --resume`, `convert_pretrained_checkpoint`, `generate`",
        trains="yes, 4 sites",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes, with the key-value cache, compiled or not",
        checkpoint="yes",
        notes="a data module whose loader has a state dict, without which litgpt does not resume",
    ).record(regenerate)
