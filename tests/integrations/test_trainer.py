"""The Trainer of transformers: trains, saves, resumes."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.builders import build

import mhc_compile
import mhc_compile.integrations

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

EAGER = {"inner_backend": "eager"}
LAYERS = 1


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 31, (16, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def model(name: str = "gpt2", layers: int = LAYERS):
    torch.manual_seed(2)
    return build(name, layers).model


def trainer(model, folder: Path, **settings):
    settings = {"weight_decay": 0.1, "learning_rate": 1e-2, "max_steps": 4, **settings}
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=data(), eval_dataset=data())


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def groups(trainer) -> list[list[str]]:
    """Names of the parameters, group by group."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def assert_equal(one, two) -> None:
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_trains_saves_and_resumes(tmp_path, caplog):
    """The first run attaches at its first step, as an unmodified script does; the second puts back
    what the first saved.
    """
    first = model()
    first.compile(backend="mhc", options=EAGER)
    whole = trainer(first, tmp_path / "whole")
    whole.train()
    assert all(c.phi.any() for c in mhc_compile.connections(first).values())
    assert len(mhc_compile.connections(first)) == 2 * LAYERS
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")

    second = model()
    second.compile(backend="mhc", options=EAGER)
    mhc_compile.restore(second, tmp_path / "half" / "checkpoint-2")
    resumed = trainer(second, tmp_path / "half")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        resumed.train(resume_from_checkpoint=True)
    assert "unexpected keys" not in caplog.text
    assert groups(resumed) == groups(whole)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 4
    assert_equal(first, second)

    # Without them the Trainer gives up, and the model that was loaded is not the one that was
    # saved.
    third = model()
    third.compile(backend="mhc", options=EAGER)
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        trainer(third, tmp_path / "half").train(resume_from_checkpoint=True)

    # from_pretrained leaves them out; restored, the model computes what it computed.
    ids = data()[0]["input_ids"][None]
    with pytest.warns(mhc_compile.MhcWarning, match=r"mhc_compile\.restore\(model, .*checkpoint-4"):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert not mhc_compile.connections(loaded)
    assert len(mhc_compile.restore(loaded, tmp_path / "whole" / "checkpoint-4")) == 2 * LAYERS
    assert_equal(loaded, first)
    want = mhc_compile.eager(first.eval())(ids).logits
    assert torch.equal(mhc_compile.eager(loaded)(ids).logits, want)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loaded, backend="mhc", options=EAGER)(ids).logits, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attached_ahead_trains_as_attached_at_the_first_step(name, tmp_path):
    one, two = model(name), model(name)
    mhc_compile.attach(two, input_ids=data()[0]["input_ids"][None])
    assert_equal_but_for_mhc = {n for n in two.state_dict() if n not in one.state_dict()}
    assert len(assert_equal_but_for_mhc) == 3 * 2 * LAYERS
    trainers = []
    for index, each in enumerate((one, two)):
        torch._dynamo.reset()
        each.compile(backend="mhc", options=EAGER)
        trainers.append(trainer(each, tmp_path / str(index)))
        trainers[-1].train()
    assert groups(trainers[0]) == groups(trainers[1])
    assert losses(trainers[0]) == losses(trainers[1])
    assert_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_backend_by_name_in_training_arguments(name, tmp_path):
    """Through Inductor: the arguments name the backend and have no place for its options."""
    with pytest.raises(ValueError, match="'MHC' is not a valid DynamoBackend"):
        _without_registration(lambda: trainer(model(), tmp_path, torch_compile_backend="mhc"))
    mhc_compile.integrations.register_with_accelerate()
    settings = {"torch_compile": True, "torch_compile_backend": "mhc"}
    whole = trainer(model(name), tmp_path / "whole", **settings)
    whole.train()
    assert len(mhc_compile.connections(whole.model)) == 2 * LAYERS
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    torch._dynamo.reset()
    again = model(name)
    mhc_compile.attach(again, input_ids=data()[0]["input_ids"][None])
    resumed = trainer(again, tmp_path / "half", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_equal(resumed.model, whole.model)
    # After training the Trainer evaluates the model that it was given, in eager, whatever the
    # backend.
    for connection in mhc_compile.connections(again).values():
        torch.nn.init.normal_(connection.bias, std=3.0)
    want = trainer(mhc_compile.eager(again), tmp_path / "eager").evaluate()["eval_loss"]
    plain = trainer(mhc_compile.plain(again), tmp_path / "plain").evaluate()["eval_loss"]
    assert resumed.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-6)
    assert plain != pytest.approx(want, abs=1e-5)
    saved = set(_saved(tmp_path / "half" / "checkpoint-4"))
    assert {f"{path}.{part}" for path in mhc_compile.connections(again) for part in ("phi", "bias", "scale")} <= saved


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model.safetensors")


def _without_registration(call) -> None:
    from accelerate.utils import DynamoBackend

    hook, known = DynamoBackend.__dict__.get("_missing_"), DynamoBackend._value2member_map_.pop("MHC", None)
    if hook is not None:
        del DynamoBackend._missing_
    try:
        call()
    finally:
        if hook is not None:
            DynamoBackend._missing_ = hook
        if known is not None:
            DynamoBackend._value2member_map_["MHC"] = known


@pytest.mark.slow
def test_gradient_checkpointing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        each = model("llama")
        each.compile(backend="mhc", options={"inner_backend": "aot_eager"})
        runs.append(trainer(each, tmp_path / str(checkpointing), max_steps=3, gradient_checkpointing=checkpointing))
        runs[-1].train()
        assert each.model.gradient_checkpointing == checkpointing
        assert all(c.phi.any() for c in mhc_compile.connections(each).values())
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)


@pytest.mark.slow
def test_evaluation_accumulation_and_the_best_model(tmp_path):
    each = model(layers=2)
    each.compile(backend="mhc", options=EAGER)
    run = trainer(
        each,
        tmp_path,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one, so that something is loaded
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluated[1] < evaluated[0]
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[0], rel=1e-6)
    # On streams: without them the loss is another one.
    bare = model(layers=2)
    bare.load_state_dict(each.state_dict(), strict=False)
    assert trainer(bare, tmp_path).evaluate()["eval_loss"] != pytest.approx(evaluated[0], rel=1e-5)
