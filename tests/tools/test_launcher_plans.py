"""`mhc plan` and `mhc run --plan`: a program around a model, as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mhc_compile

MHC = [sys.executable, "-m", "mhc_compile"]
MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""
#: The order of most trainers: build, load, optimizer by dimensions, compile, train, save.
TRAIN = """
import os, sys
import torch
from model import Net

steps = int(sys.argv[1])
torch.manual_seed(0)
model, start = Net(), 0
saved = torch.load("checkpoint.pt") if os.path.exists("checkpoint.pt") else None
if saved:
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
    start = saved["step"]
matrices = [p for p in model.parameters() if p.dim() >= 2]
vectors = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.05)
if saved:
    optimizer.load_state_dict(saved["optimizer"])
compiled = torch.compile(model)
for step in range(start, steps):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    loss = (compiled(x) - x.roll(1, 0)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
state = {"model": compiled.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
torch.save(state, "checkpoint.pt")
open("trained", "w").close()
"""
#: A second program, which compiles nothing.
SAMPLE = """
import torch
from model import Net

model = Net().eval()
saved = torch.load("checkpoint.pt")["model"]
model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved.items()})
print(model(torch.ones(1, 8)).tolist())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    for name, text in {"model": MODEL, "train": TRAIN, "sample": SAMPLE}.items():
        Path(f"{name}.py").write_text(text)
    return tmp_path


def mhc(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*MHC, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return mhc("run", "--inner-backend", "eager", *words, code=code)


def reports(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("mhc run: ") for line in done.stderr.splitlines() if line.startswith("mhc run: ")]


def sampled(**options: int) -> list[list[float]]:
    """What the trained model computes, by the equations operation by operation."""
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(compile(MODEL, "model.py", "exec"), namespace)
    model = namespace["Net"]().eval()
    state = torch.load("checkpoint.pt")["model"]
    mhc_compile.restore(model, state)
    mhc_compile.load_state_dict(model, state)
    return mhc_compile.eager(model, options=options)(torch.ones(1, 8)).tolist()


def numbers(text: str) -> torch.Tensor:
    return torch.tensor(json.loads(text))


def test_a_script_is_planned_without_training_or_writing(folder):
    done = mhc("plan", "-o", "net.json", "train.py", "8")
    assert done.stdout == ""
    assert done.stderr == f"mhc plan: {folder}/net.json: Net (3 hyper-connections)\n"
    assert sorted(path.name for path in folder.glob("*") if path.is_file()) == [
        "model.py", "net.json", "sample.py", "train.py",
    ]  # fmt: skip
    (plan,) = mhc_compile.Plan.load("net.json").models
    assert [entry.path for entry in plan.connections] == [f"blocks.{i}.mhc.down" for i in range(3)]


@pytest.mark.slow
def test_with_a_plan_a_program_trains_resumes_and_samples(folder):
    whole = run("--plan", "net.json", "train.py", "6")
    assert Path("net.json").exists()  # it was missing, and made first
    assert reports(whole) == [
        "Net: 3 hyper-connections, 0 additions skipped (streams 4, mapping sinkhorn)",
        "trained: 3 parameters in AdamW group 0, 6 parameters in AdamW group 1; saved: all hyper-connections in checkpoint.pt",
    ]
    want = torch.load("checkpoint.pt")
    Path("checkpoint.pt").unlink()
    first = run("--plan", "net.json", "train.py", "3")
    second = run("--plan", "net.json", "train.py", "6")
    assert first.stdout + second.stdout == whole.stdout
    got = torch.load("checkpoint.pt")
    assert all(torch.equal(got["model"][name], value) for name, value in want["model"].items())
    assert sum(".mhc." in name for name in got["model"]) == 9
    torch.testing.assert_close(numbers(run("--plan", "net.json", "sample.py").stdout), torch.tensor(sampled()))


@pytest.mark.slow
def test_without_a_plan_the_checkpoint_gives_the_places(folder):
    whole = run("train.py", "6")
    want = torch.load("checkpoint.pt")
    Path("checkpoint.pt").unlink()
    assert run("train.py", "3").stdout + run("train.py", "6").stdout == whole.stdout
    got = torch.load("checkpoint.pt")
    assert all(torch.equal(got["model"][name], value) for name, value in want["model"].items())
    torch.testing.assert_close(numbers(run("sample.py").stdout), torch.tensor(sampled()))
    plain = subprocess.run([sys.executable, "sample.py"], capture_output=True, text=True, check=False)
    assert "Unexpected key(s) in state_dict" in plain.stderr


@pytest.mark.slow
def test_a_checkpoint_with_other_options_is_restored_with_them(folder):
    run("--streams", "2", "train.py", "3")
    torch.testing.assert_close(numbers(run("sample.py").stdout), torch.tensor(sampled(streams=2)))


@pytest.mark.slow
def test_a_script_that_never_compiles(folder):
    Path("train.py").write_text(TRAIN.replace("torch.compile(model)", "model"))
    nothing = run("train.py", "1")
    assert "ran no model that torch.compile made" in nothing.stderr
    assert "or add --compile" in nothing.stderr
    Path("checkpoint.pt").unlink()
    assert mhc("plan", "train.py", "1", code=1).stderr.endswith("ran no model that torch.compile made. Add --compile\n")
    assert not Path("checkpoint.pt").exists()  # it ended before the first backward
    compiled = run("--compile", "train.py", "3")
    assert reports(compiled)[0].startswith("Net: 3 hyper-connections")
    Path("checkpoint.pt").unlink()
    mhc("plan", "--compile", "train.py", "3")
    assert run("--plan", "mhc.json", "train.py", "3").stdout == compiled.stdout  # compiled in place by its plan


@pytest.mark.slow
def test_a_script_that_names_inductor(folder):
    Path("train.py").write_text(TRAIN.replace("torch.compile(model)", "torch.compile(model, backend='inductor')"))
    replaced = run("--replace-inductor", "train.py", "2")
    assert reports(replaced)[0].startswith("Net: 3 hyper-connections")


@pytest.mark.slow
def test_a_named_backend_gets_the_options_of_the_table(folder):
    Path("pyproject.toml").write_text("[tool.mhc]\nstreams = 2\nplan = 'net.json'\n")
    Path("train.py").write_text(TRAIN.replace("torch.compile(model)", "torch.compile(model, backend='mhc')"))
    done = run("train.py", "2")
    assert "streams 2" in reports(done)[0]
    assert mhc_compile.Plan.load("net.json").models[0].options["streams"] == 2


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_are_planned_as_a_whole(folder):
    Path("train.py").write_text(
        TRAIN.replace("compiled = torch.compile(model)", "compiled = model\nfor b in model.blocks:\n    b.compile()")
    )
    mhc("plan", "train.py", "2")
    (plan,) = mhc_compile.Plan.load("mhc.json").models
    assert (plan.kind, [entry.index for entry in plan.connections]) == ("Net", [0, 1, 2])
    assert run("--plan", "mhc.json", "train.py", "2").stdout


@pytest.mark.slow
def test_a_model_that_the_plan_does_not_fit(folder):
    mhc("plan", "train.py", "2")
    Path("train.py").write_text(TRAIN.replace("Net()", "Net(4)"))
    done = run("--plan", "mhc.json", "train.py", "2")
    assert "the plan does not fit this Net: module 'blocks.3' (Block) is not in the plan" in done.stderr
    assert "was used by no model" in done.stderr
    strict = run("--strict", "--plan", "mhc.json", "train.py", "2", code=1)
    assert "AttachError: the plan does not fit this Net" in strict.stderr


@pytest.mark.slow
def test_parameters_in_no_optimizer_are_reported(folder):
    Path("train.py").write_text(TRAIN.replace('{"params": vectors, "weight_decay": 0.0}', "").replace(", ]", "]"))
    mhc("plan", "train.py", "2")
    done = run("--existing-optimizers", "ignore", "--plan", "mhc.json", "train.py", "2")
    assert "WARNING: 6 parameters in no optimizer (blocks.0.mhc.down.bias, blocks.0.mhc.down.scale" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--plan", "model.py", "train.py", "2"], "'{folder}/model.py' is no plan. `mhc plan -o FILE train.py`"),
        (["plan", "missing.py"], "missing.py"),
    ],
)
def test_wrong_usage(folder, words, message):
    done = mhc(*words, code=2)
    assert message.format(folder=folder) in " ".join(done.stderr.split()), done.stderr


@pytest.mark.slow
def test_options_that_contradict_a_plan_are_wrong_usage(folder):
    mhc("plan", "--streams", "2", "--overrides", "blocks.1.down={'mapping': 'identity'}", "train.py", "2")
    assert reports(run("--plan", "mhc.json", "train.py", "2"))[0].startswith("Net: 3 hyper-connections")
    done = mhc("run", "--streams", "8", "--plan", "mhc.json", "train.py", "2", code=2)
    other = mhc("run", "--overrides", "blocks.0.down={'init_gain': 0.5}", "--plan", "mhc.json", "train.py", "2", code=2)
    assert "was made with init_gain=0.01 for blocks.0.mhc.down" in " ".join(other.stderr.split())
    assert "was made with streams=2 for blocks.0.mhc.down, and streams=8 is given" in " ".join(done.stderr.split())


#: FSDP2 on the meta device, in the order of torchtitan: shard, materialise, initialise. The scale
#: of `post` starts at 0.3 and is trained (that of `pre` is not: the norm of h hides it).
SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from model import Net

dist.init_process_group("gloo")
with torch.device("meta"):
    model = Net()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
model.to_empty(device="cpu")
for number, part in enumerate(model.modules()):
    if hasattr(part, "reset_parameters") and type(part).__module__.startswith("torch.nn"):
        torch.manual_seed(number)
        part.reset_parameters()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
compiled = torch.compile(model)
for step in range(3):
    loss = compiled(torch.randn(2, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert loss.isfinite()
sites = [part for name, part in model.named_modules() if name.endswith("mhc.down")]
scales = [part.scale.detach().full_tensor()[1].item() for part in sites]
if dist.get_rank() == 0:
    print(loss.item(), [1e-6 < abs(value - 0.3) < 0.1 for value in scales])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_that_is_sharded_on_the_meta_device(folder):
    Path("sharded.py").write_text(SHARDED)
    workers = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "sharded.py")
    mhc("plan", "-o", "net.json", *workers)
    assert [model.kind for model in mhc_compile.Plan.load("net.json").models] == ["Net"]
    done = run("--plan", "net.json", *workers)
    assert done.stdout.endswith("[True, True, True]\n"), done.stdout
    assert reports(done)[-1] == "trained: 9 parameters in SGD group 0"
    late = run(*workers, code=1)
    assert "FSDP sharded the Block before its hyper-connections were attached" in late.stderr
    assert "mhc run --plan mhc.json" in late.stderr


@pytest.mark.slow
def test_a_target_is_planned_like_a_script(folder):
    Path("factory.py").write_text(
        "import torch\nfrom model import Net\ndef make():\n    return Net(), (torch.ones(2, 8),)\n"
    )
    mhc("plan", "-o", "target.json", "factory.py:make")
    mhc("plan", "-o", "script.json", "train.py", "2")
    assert Path("target.json").read_text() == Path("script.json").read_text()
