"""transformers: the Trainer in the order of run_clm.py, and `from_pretrained`."""

from __future__ import annotations

import ast
import re

import pytest
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

pytestmark = [pytest.mark.slow, needs("transformers", "accelerate")]

SCRIPT = str(SCRIPTS / "run_clm.py")
GPT2 = "n_embd=16,n_layer=2,n_head=2,vocab_size=32,n_positions=32,resid_pdrop=0.0,attn_pdrop=0.0,embd_pdrop=0.0"
TRAIN = [SCRIPT, "--config_overrides", f"{GPT2},bos_token_id=0,eos_token_id=31", "--do_train", "--torch_compile"]
TRAIN += "--per_device_train_batch_size 4 --max_steps 6 --save_steps 3 --logging_steps 1 --learning_rate 1e-2".split()
QUIET = ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]

REFERENCE = """
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
state = load_file("resumed/model.safetensors")
state["lm_head.weight"] = state["transformer.wte.weight"]
config = AutoConfig.from_pretrained("resumed")
tokens = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(0))[:4]

def evaluate(model):
    loss = float(model(tokens, labels=tokens, num_items_in_batch=tokens.numel()).loss)  # as the Trainer calls it
    row = tokens[:1, :3]
    while row.shape[1] < 11 and row[0, -1] != 31:
        row = torch.cat([row, model(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return [loss, row[0].tolist()]

both(lambda: AutoModelForCausalLM.from_config(config), state, evaluate)
"""


def losses(output: str) -> list[str]:
    return re.findall(r"'loss': '?([\d.]+)", output)


@pytest.mark.parametrize(
    ("backend", "flags"),
    [(["--torch_compile_backend", "mhc"], []), ([], ["--replace-inductor"])],
    ids=["named", "default"],
)
def test_trainer(tmp_path, backend, flags, regenerate):
    safetensors = pytest.importorskip("safetensors.torch")
    program, train = Program(tmp_path, *flags), [*TRAIN, *QUIET, *backend]
    assert program.plan(*train, "--output_dir", "planned") == 4
    whole = program.run(*train, "--output_dir", "whole")
    resumed = program.run(*train, "--output_dir", "resumed", "--resume_from_checkpoint", "whole/checkpoint-3")
    assert losses(resumed.stdout) == losses(whole.stdout)[3:]
    early, uninterrupted, saved = (
        safetensors.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("whole/checkpoint-3", "whole", "resumed")
    )
    assert sites(saved) == 4
    assert_equal(uninterrupted, saved)
    assert_moved(early, saved)
    assert_each_in_one(saved, load(tmp_path / "resumed" / "checkpoint-6" / "optimizer.pt"))

    stir(saved, weights=0.2)
    safetensors.save_file(saved, tmp_path / "resumed" / "model.safetensors", metadata={"format": "pt"})
    loss, tokens = program.reference(REFERENCE)
    for compiled in ([], ["--torch_compile", *backend]):
        evaluate = [SCRIPT, "--model_name_or_path", "resumed", "--do_eval", "--output_dir", "evaluated", *QUIET]
        done = program.run(*evaluate, *compiled)
        assert float(re.search(r"evaluation loss ([\d.]+)", done.stdout)[1]) == pytest.approx(loss, abs=1e-5)
        assert ast.literal_eval(re.search(r"generated (.*)", done.stdout)[1]) == tokens
    torch_compile = " ".join(["--torch_compile", *backend])
    Row(
        f"transformers {version('transformers')} Trainer, accelerate {version('accelerate')}",
        f"`{' '.join(['mhc run', *flags])} run_clm.py {torch_compile}`, `--resume_from_checkpoint`, `--do_eval`, `generate`",
        trains="yes, 4 sites",
        in_optimizer="yes, in the groups by weight decay",
        resumes="yes",
        evaluates="yes, loss and `generate`, compiled or not",
        checkpoint="yes, safetensors",
        notes="own script in the order of run_clm.py: the package has none",
    ).record(regenerate)
