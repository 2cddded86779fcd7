"""timm: its factories, task, average of weights, saver and resume, in the order of its train.py."""

from __future__ import annotations

import json
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
    version,
)

pytestmark = [pytest.mark.slow, needs("timm")]

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
#: Model, its settings, size of the image, sites.
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT, 16, 4),
    "convnext": ("convnext_atto", {"depths": [2, 2, 2, 2], "dims": [8, 8, 16, 16]}, 32, 8),
}

REFERENCE = """
import json
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
name, settings, size, key = json.loads('''{spec}''')

def make():
    return create_model(name, num_classes=2, **settings)

config = resolve_data_config(dict(img_size=size), model=make())
loader = create_loader(create_dataset("", root="data", split="validation"), config["input_size"], batch_size=8,
    use_prefetcher=False, num_workers=0, crop_pct=1.0, mean=config["mean"], std=config["std"],
    device=torch.device("cpu"))
images, labels = next(iter(loader))
state = torch.load("output/resumed/checkpoint-3.pth.tar", weights_only=False)[key]
both(make, state, lambda model: float(torch.nn.functional.cross_entropy(model(images), labels)))
"""


@pytest.fixture
def program(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in "ab":
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(4):  # one batch an epoch: no order to resume
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.png")
    return Program(tmp_path)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"(?:train|validation|loss) ([\d.]+)", output)]


@pytest.mark.parametrize("kind", MODELS)
def test_timm(program, kind, regenerate):
    name, settings, size, count = MODELS[kind]
    model = ["--data-dir", "data", "--img-size", str(size), "--num-classes", "2", "--model", name]
    model += ["--model-kwargs", json.dumps(settings)]
    train = [str(SCRIPTS / "timm_order" / "train.py"), *model, "--torchcompile", "mhc", "--model-ema"]
    train += ["--layer-decay", "0.9", "--clip-grad", "0.1", "--clip-mode", "agc"] if kind == "vit" else []
    assert program.plan(*train, "--experiment", "planned") == count
    whole = program.run(*train, "--experiment", "whole")
    resumed = program.run(*train, "--experiment", "resumed", "--resume", "output/whole/checkpoint-1.pth.tar")
    assert losses(resumed.stdout) == pytest.approx(losses(whole.stdout)[-len(losses(resumed.stdout)) :], abs=1e-5)
    early, uninterrupted, saved = (
        load(program.folder / "output" / file)
        for file in ("whole/checkpoint-1.pth.tar", "whole/checkpoint-3.pth.tar", "resumed/checkpoint-3.pth.tar")
    )
    for key in ("state_dict", "state_dict_ema"):
        assert sites(saved[key]) == count
        assert_equal(uninterrupted[key], saved[key])
        assert_moved(early[key], saved[key])
    assert_each_in_one(saved["state_dict"], saved["optimizer"])

    for key in ("state_dict", "state_dict_ema"):
        stir(saved[key], seed=len(key))
    torch.save(saved, program.folder / "output" / "resumed" / "checkpoint-3.pth.tar")
    validate = [str(SCRIPTS / "timm_order" / "validate.py"), *model]
    validate += ["--checkpoint", "output/resumed/checkpoint-3.pth.tar"]
    runs = (["state_dict_ema", "--use-ema"], ["state_dict"], ["state_dict", "--torchcompile", "mhc"])
    for key, *flags in runs if kind == "vit" else runs[:1]:
        expected = program.reference(REFERENCE.format(spec=json.dumps([name, settings, size, key])))
        assert losses(program.run(*validate, *flags).stdout) == pytest.approx([expected], abs=1e-5)
    Row(
        f"timm {version('timm')}",
        f"`train.py --model {name} --torchcompile mhc --model-ema`, `--resume`, `validate.py`",
        trains=f"yes, {count} sites",
        in_optimizer="yes, with layer decay" if kind == "vit" else "yes",
        resumes="yes, model and average",
        evaluates="yes, model and average, compiled or not" if kind == "vit" else "yes, the average",
        checkpoint="yes",
        notes="own scripts in timm's order: the package has none",
    ).record(regenerate)
