"""trl: its `sft` script on a small GPT-2, of all parameters and of an adapter."""

from __future__ import annotations

import json
import re

import pytest
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

pytestmark = [pytest.mark.slow, needs("trl", "peft", "transformers", "datasets")]

TRAIN = """
-m trl.scripts.sft --model_name_or_path base --dataset_name data --max_steps 6 --save_steps 3 --logging_steps 1
--per_device_train_batch_size 4 --learning_rate 1e-2 --dtype float32 --bf16 false --use_cpu
--report_to none --disable_tqdm true --torch_compile --torch_compile_backend mhc
""".split()
LORA = "--use_peft --lora_r 2 --lora_target_modules attn.c_attn mlp.c_fc".split()

BASE = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(32)}, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w31", pad_token="w30").save_pretrained("base")
torch.manual_seed(0)
config = GPT2Config(
    n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=31,
    resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
)
AutoModelForCausalLM.from_config(config).save_pretrained("base")
"""
EVALUATE = """
import torch
from transformers import AutoModelForCausalLM

def loss_of(model):
    tokens = torch.arange(48).reshape(4, 12) % 30
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)

"""
REFERENCE = """
from safetensors.torch import load_file
from transformers import AutoConfig
state = load_file("resumed/model.safetensors")
state["lm_head.weight"] = state["transformer.wte.weight"]
both(lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("base")), state, loss_of)
"""


@pytest.fixture
def program(tmp_path):
    program = Program(tmp_path)
    program.environment["HF_HOME"] = str(tmp_path / "home")
    (tmp_path / "base.py").write_text(BASE)
    program.run("base.py", mhc=False)
    rows = [{"text": " ".join(f"w{(7 * row + row * column) % 30}" for column in range(12))} for row in range(24)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert program.plan(*TRAIN, "--output_dir", "planned") == 4
    return program


def losses(output: str) -> list[str]:
    return re.findall(r"'loss': '?([\d.]+)", output)


def test_trl(program, tmp_path, regenerate):
    safetensors = pytest.importorskip("safetensors.torch")

    def read(*files: str) -> list:
        return [safetensors.load_file(tmp_path / file) for file in files]

    whole = program.run(*TRAIN, "--output_dir", "whole")
    resumed = program.run(*TRAIN, "--output_dir", "resumed", "--resume_from_checkpoint", "whole/checkpoint-3")
    assert losses(resumed.stdout) == losses(whole.stdout)[3:]
    early, uninterrupted, saved = read(
        "whole/checkpoint-3/model.safetensors", "whole/model.safetensors", "resumed/model.safetensors"
    )
    assert sites(saved) == 4
    assert_equal(uninterrupted, saved)
    assert_moved(early, saved)
    assert_each_in_one(saved, load(tmp_path / "resumed" / "checkpoint-6" / "optimizer.pt"))

    stir(saved)
    safetensors.save_file(saved, tmp_path / "resumed" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "evaluate.py").write_text(
        f"{EVALUATE}print('loss', loss_of(AutoModelForCausalLM.from_pretrained('resumed').eval()))\n"
    )
    done = program.run("evaluate.py")
    expected = program.reference(EVALUATE + REFERENCE)
    assert float(re.search(r"loss ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, abs=1e-5)

    program.run(*TRAIN, *LORA, "--output_dir", "adapted")
    adapter, last = read("adapted/checkpoint-3/adapter_model.safetensors", "adapted/adapter_model.safetensors")
    assert sites(last) == 4
    assert_moved(adapter, last)
    assert_each_in_one(last, load(tmp_path / "adapted" / "checkpoint-6" / "optimizer.pt"))
    Row(
        f"trl {version('trl')}",
        "`mhc run -m trl.scripts.sft --torch_compile --torch_compile_backend mhc`, `--resume_from_checkpoint`, `--use_peft`",
        trains="yes, 4 sites, activations checkpointed",
        in_optimizer="yes, and with an adapter",
        resumes="yes",
        evaluates="yes, never compiled",
        checkpoint="yes, safetensors, and in the adapter",
    ).record(regenerate)
