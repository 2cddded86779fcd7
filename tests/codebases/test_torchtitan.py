"""torchtitan's trainer: Llama 3, FSDP2 from the meta device, blocks compiled one by one."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from codebases.harness import (
    Program,
    Row,
    assert_equal,
    assert_moved,
    connections,
    load,
    needs,
    sites,
    stir,
    version,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

pytestmark = [pytest.mark.slow, needs("torchtitan", "triton", apart="torchtitan")]

#: The module `titan_config` stands for a user's own registry of configurations.
TRAIN = [
    "-m", "torch.distributed.run", "--nproc-per-node", "2",
    "-m", "titan_cpu", "--module", "titan_config", "--config", "tiny", "--debug.seed", "1",
    "--compile.enable", "--compile.backend", "mhc",
]  # fmt: skip


HEAD = """
import torch
from titan_config import batch, loss_of, make
state = {name: value for name, value in torch.load("early.pt").items() if isinstance(value, torch.Tensor)}
"""
#: The state of a file with Hugging Face's names.
FROM_HF = """
from safetensors.torch import load_file
from titan_config import tiny
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
entries = load_file("converted.safetensors")
state = {name: value for name, value in entries.items() if ".mhc." in name}
plain = {name: value for name, value in entries.items() if name not in state}
state |= Llama3StateDictAdapter(tiny().model_spec.model, None).from_hf(plain)
"""


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step:\s+(\d+)\s+loss:\s+([\d.]+)", output)}


def read(folder) -> dict:
    """Return a distributed checkpoint as one dict: the model's tensors, and the rest."""
    dcp_to_torch_save(folder, folder.with_suffix(".pt"))
    return load(folder.with_suffix(".pt"))


def model_of(state: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def test_torchtitan(tmp_path, regenerate):
    program = Program(tmp_path, apart="torchtitan")
    assert program.plan(*TRAIN, "--dump_folder", "planned") == 4
    whole = program.run(*TRAIN, "--dump_folder", "whole")
    assert "in all 4 hyper-connections (2 × Llama3TransformerBlock) in 2 processes" in whole.stderr
    report = (
        "trained: 12 parameters in AdamW group 0; saved: all hyper-connections in whole/checkpoint/step-6 and 1 other\n"
    )
    assert report in whole.stderr
    early, last = (read(tmp_path / "whole" / "checkpoint" / f"step-{step}") for step in (3, 6))
    assert sites(last) == 4
    assert_moved(early, last)
    held = {name.split(".", 1)[1].rpartition(".")[0] for name in last["optimizer"] if name.startswith("state.")}
    assert connections(last).keys() <= held
    assert len(held) == 17 + 12  # torchtitan's own, and three of every hyper-connection

    shutil.copytree(tmp_path / "whole" / "checkpoint" / "step-3", tmp_path / "resumed" / "checkpoint" / "step-3")
    resumed = program.run(*TRAIN, "--dump_folder", "resumed")
    want = losses(whole.stdout + whole.stderr)
    assert losses(resumed.stdout + resumed.stderr) == {step: want[step] for step in (4, 5, 6)}
    assert_equal(model_of(last), model_of(read(tmp_path / "resumed" / "checkpoint" / "step-6")))

    # Losses of two ranks on the parameters of `early`, all of them far from the start.
    stir(early)
    torch.save(early, tmp_path / "early.pt")
    torch_save_to_dcp(tmp_path / "early.pt", tmp_path / "stirred" / "checkpoint" / "step-3")
    expected = program.reference(f"{HEAD}both(make, state, lambda model: loss_of(model, batch(0, 3), batch(1, 3)))")
    save_hf = ["--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"]
    stirred = program.run(*TRAIN, "--dump_folder", "stirred", "--training.steps", "4", *save_hf)
    assert losses(stirred.stdout + stirred.stderr)[4] == pytest.approx(expected, abs=1e-5)
    (tmp_path / "evaluate.py").write_text(
        f"{HEAD}model = make().eval()\nmodel.load_state_dict(state)\n"
        "with torch.no_grad():\n    print('loss', loss_of(model, batch(0, 3), batch(1, 3)))\n"
    )
    done = program.run("evaluate.py")
    assert float(re.search(r"loss ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, abs=1e-5)

    # Hugging Face's names: saved, loaded to train on, and saved in two files by an index.
    folder = tmp_path / "stirred" / "checkpoint" / "step-4"
    (converted,) = folder.glob("*.safetensors")
    names = load_file(converted).keys()
    assert sites(load_file(converted)) == 4
    assert "model.layers.0.self_attn.o_proj.weight" in names
    shutil.copy(converted, tmp_path / "converted.safetensors")
    files = {
        name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in names if ".mhc." not in name
    }
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    load_hf = [
        "--checkpoint.initial_load_path",
        str(folder),
        "--checkpoint.initial_load_in_hf",
        "--training.steps",
        "1",
    ]
    loaded = program.run(*TRAIN, "--dump_folder", "loaded", *load_hf, *save_hf, "--hf_assets_path", "assets")
    expected = program.reference(
        f"{HEAD}{FROM_HF}both(make, state, lambda model: loss_of(model, batch(0, 0), batch(1, 0)))"
    )
    assert losses(loaded.stdout + loaded.stderr)[1] == pytest.approx(expected, abs=1e-5)
    first, second = sorted((tmp_path / "loaded" / "checkpoint" / "step-1").glob("*.safetensors"))
    assert load_file(first).keys() | load_file(second).keys() == names
    assert sites(load_file(first)) == 4

    program.planned = []  # a model without hyper-connections, which torch.compile never sees
    uncompiled = [word for word in TRAIN if word not in {"--compile.enable", "--compile.backend", "mhc"}]
    done = program.run(
        *uncompiled,
        "--dump_folder",
        "plain",
        *load_hf,
        warns="has hyper-connections (layers.0.mhc.attention.bias, ...) that this",
    )
    assert "has hyper-connections (layers.0.mhc.attention.bias, ...) that this model has not" in done.stderr
    Row(
        f"torchtitan {version('torchtitan', 'torchtitan')}",
        "`-m torch.distributed.run --nproc-per-node 2 -m torchtitan.train --compile.enable --compile.backend mhc`,"
        " `initial_load_in_hf`, `last_save_in_hf`",
        trains="yes, 4 sites, FSDP2 on gloo from the meta device, blocks compiled one by one, SelectiveAC",
        in_optimizer="yes",
        resumes="yes",
        evaluates="yes, never compiled",
        checkpoint="yes, distributed and by Hugging Face's names",
        notes="its Llama 3 and trainer, started by `titan_cpu.py`: memory statistics of the CPU, sums that gloo has, timeouts"
        " left out; own configuration: an `spmd_backend` of torch 2.13, an attention that the CPU can train",
    ).record(regenerate)
