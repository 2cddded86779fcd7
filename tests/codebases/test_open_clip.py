"""open_clip's `python -m open_clip_train.main` with an image and a text tower."""

from __future__ import annotations

import json
import re

import numpy as np
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

pytestmark = [pytest.mark.slow, needs("open_clip_torch")]

TOWER = {"width": 32, "layers": 2}
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {**TOWER, "image_size": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {**TOWER, "context_length": 12, "vocab_size": 49408, "heads": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
MAIN = (
    "-m open_clip_train.main --model local-dir:model --dataset-type csv --batch-size 4 --workers 0 --device cpu"
    " --precision fp32"
)
#: With its usual epsilon Adam turns the rounding of a shuffled batch into whole steps.
ADAM = "--lr 1e-2 --eps 1e-2"
TRAIN = "--train-data pairs.csv --warmup 1 --lr-scheduler const --aug-cfg scale=(1.0,1.0) ratio=(1.0,1.0)"

REFERENCE = """
import open_clip
from open_clip_train.data import get_data
from open_clip_train.params import parse_args
from open_clip_train.train import get_clip_metrics

def make():
    return open_clip.create_model("local-dir:model", output_dict=True)

arguments = "--model local-dir:model --dataset-type csv --batch-size 4 --workers 0 --val-data pairs.csv".split()
args = parse_args(arguments)
args.distributed = False
_, _, preprocess = open_clip.create_model_and_transforms("local-dir:model")
data = get_data(args, (preprocess, preprocess), tokenizer=open_clip.get_tokenizer("local-dir:model"))
images, texts = next(iter(data["val"].dataloader))

def evaluate(model):
    out = model(images, texts)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    labels = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return float((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)

both(make, torch.load("logs/resumed/checkpoints/epoch_4.pt", weights_only=True)["state_dict"], evaluate)
"""


@pytest.fixture
def program(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(CONFIG))
    lines = ["filepath\ttitle"]
    for number, caption in enumerate(["a cat", "two dogs", "the sea", "one house"]):  # one batch: no order to resume
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png\t{caption}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return Program(tmp_path)


def losses(output: str, kind: str) -> list[float]:
    return [float(loss) for loss in re.findall(rf"{kind} Epoch: .*Loss: ([\d.]+)", output)]


def test_open_clip(program, regenerate):
    train, logs = [*MAIN.split(), *TRAIN.split(), *ADAM.split(), "--torchcompile"], program.folder / "logs"
    assert program.plan(*train, "--name", "planned") == 8
    program.run(*train, "--name", "whole", "--epochs", "4")
    program.run(*train, "--name", "resumed", "--epochs", "4", "--resume", "logs/whole/checkpoints/epoch_2.pt")
    early = load(logs / "whole" / "checkpoints" / "epoch_2.pt")
    whole, resumed = (load(logs / name / "checkpoints" / "epoch_4.pt") for name in ("whole", "resumed"))
    assert sites(resumed["state_dict"]) == 8
    assert_equal(whole["state_dict"], resumed["state_dict"])
    assert_moved(early["state_dict"], whole["state_dict"])
    buffers = {"attn_mask"}
    parameters = {name: value for name, value in whole["state_dict"].items() if name not in buffers}
    assert_each_in_one(parameters, whole["optimizer"])

    stir(resumed["state_dict"])
    torch.save(resumed, logs / "resumed" / "checkpoints" / "epoch_4.pt")
    expected = program.reference(REFERENCE)
    validate = [*MAIN.split(), "--val-data", "pairs.csv", "--resume", "logs/resumed/checkpoints/epoch_4.pt"]
    for name, *flags in (["never compiled"], ["compiled", "--torchcompile"]):
        done = program.run(*validate, "--name", name, *flags)
        assert losses(done.stdout + done.stderr, "Eval") == pytest.approx([expected], abs=1e-5)
    Row(
        f"open_clip {version('open_clip_torch')}",
        "`-m open_clip_train.main --torchcompile`, `--resume`, `--val-data`",
        trains="yes, 8 sites in two towers",
        in_optimizer="yes, in the groups by name and dimension",
        resumes="yes",
        evaluates="yes, compiled or not",
        checkpoint="yes",
    ).record(regenerate)
