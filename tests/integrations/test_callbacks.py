"""`mhc_compile.integrations.StabilityCallback`: the training goes on as if nothing had been
measured, in every kind of loop.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Small, points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mhc_compile
import mhc_compile.errors
import mhc_compile.integrations

EAGER = {"inner_backend": "eager"}


class Noisy(Small):
    """With dropout: a number that a measurement draws would show in every later loss."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.3, self.training)


def train(callback=None, steps=7, lr=0.05):
    """Losses of some steps, and how many graphs were compiled."""
    graphs = []

    def counting(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch.manual_seed(0)
    model = Noisy()
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": counting})
    optimizer, losses = None, []
    for step in range(1, steps + 1):
        loss = compiled(points()).square().mean()
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if callback is not None:
            callback.step(compiled, step)
    return losses, len(graphs)


def test_a_loop_goes_on_as_if_nothing_had_been_measured(tmp_path):
    logged = []
    file = tmp_path / "stability.jsonl"
    file.write_text('{"step": -1}\n')
    callback = mhc_compile.integrations.StabilityCallback(every=3, batch=points(), log=logged.append, file=file)
    assert train(callback) == train()
    assert [step for step, _ in callback.history] == [1, 3, 6]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [-1, 1, 3, 6]
    assert [one["step"] for one in logged] == [1, 3, 6]
    for (_, result), line, one in zip(callback.history, lines[1:], logged, strict=True):
        assert line["summary"] == result.summary()
        assert len(line["chains"][0]["sites"]) == 2
        assert one == {"step": line["step"], **{f"mhc/{name}": value for name, value in result.summary().items()}}
    distances = [result.summary()["distance"] for _, result in callback.history]
    assert distances[0] < distances[2]


def test_streams_that_have_hardly_parted_are_reported_once():
    callback = mhc_compile.integrations.StabilityCallback(every=2, batch=points(), warn_after=4)
    with pytest.warns(mhc_compile.MhcWarning, match=r"step 4: The streams are 0\.0\d\d of their mean apart") as found:
        train(callback, steps=8, lr=1e-3)
    assert [step for step, _ in callback.history] == [1, 2, 4, 6, 8]
    assert sum("of their mean apart" in str(one.message) for one in found) == 1
    history = [result for _, result in callback.history]
    assert 0 < history[0].moved < history[-1].moved < 1
    for settings, lr in (
        ({"warn_after": None}, 1e-3),
        ({}, 1e-3),
        ({"warn_after": 9}, 1e-3),
        ({"warn_after": 4}, 0.05),
    ):
        callback = mhc_compile.integrations.StabilityCallback(every=2, batch=points(), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error", mhc_compile.MhcWarning)
            train(callback, steps=8, lr=lr)


def test_it_is_traced_once_and_only_until_it_is_closed():
    def attached():
        model = Small()
        mhc_compile.attach(model, points())
        return model

    def traced(model, step):
        """The number of graphs that a measurement traces."""
        before = counters["stats"]["unique_graphs"]
        assert callback.step(model, step) is not None
        return counters["stats"]["unique_graphs"] - before

    counters = torch._dynamo.utils.counters
    callback = mhc_compile.integrations.StabilityCallback(every=1, batch=points())
    model = attached()
    assert [traced(model, step) for step in range(4)] == [1, 0, 0, 0]
    callback.close()
    assert traced(model, 4) == 1
    assert traced(attached(), 5) == 1


@pytest.mark.slow
def test_number_of_measurements_of_a_loop_has_no_limit():
    class Restless(Small):
        """Traced again for every value of an attribute."""

        word = ""

        def forward(self, x):
            return super().forward(x) * len(self.word)

    model = Restless()
    mhc_compile.attach(model, points())
    callback = mhc_compile.integrations.StabilityCallback(every=1)
    for step in range(11):
        model.word = "1" * (step + 1)
        result = callback.step(model, step, points())
        assert len(result.sites) == 2
        assert result.remarks[0].startswith("All streams are copies")


def test_copied_callback_measures_and_traces_again():
    model = Small()
    mhc_compile.attach(model, points())
    callback = mhc_compile.integrations.StabilityCallback(every=2, batch=points())
    callback.step(model, 0)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.history == callback.history
        assert other.every == 2
        assert isinstance(other, mhc_compile.integrations.StabilityCallback)
        other.step(model, 2)
        assert [step for step, _ in other.history] == [0, 2]


def test_the_model_inside_ddp_is_measured():
    from mhc_compile.integrations.callbacks import _inner

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Small()
    assert _inner(torch.compile(Wrapped(torch.compile(model)))) is model


def test_wrong_arguments_raise_with_a_message():
    with pytest.raises(mhc_compile.errors.OptionError, match="every is 0"):
        mhc_compile.integrations.StabilityCallback(every=0)
    with pytest.raises(mhc_compile.errors.OptionError, match="warn_after is 0"):
        mhc_compile.integrations.StabilityCallback(warn_after=0)
    with pytest.raises(mhc_compile.MhcError, match="has no batch"):
        mhc_compile.integrations.StabilityCallback().step(Small(), 0)
    with pytest.raises(mhc_compile.errors.AttachError, match="Small has no hyper-connections"):
        mhc_compile.integrations.StabilityCallback(batch=points()).step(Small(), 0)


# --- transformers
# --------------------------------------------------------------------------------------------------


def trainer(tmp_path, callbacks, data=None):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    mhc_compile.integrations.register_with_accelerate()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8,
        vocab_size=13, attention_dropout=0.1, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": torch.arange(i, i + 5) % 13, "labels": torch.arange(i, i + 5) % 13} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", torch_compile=True, torch_compile_backend="mhc", disable_tqdm=True, seed=3,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=data or rows, callbacks=callbacks)


def losses(one):
    one.train()
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(mhc_compile.Options, "inner_backend", "eager")
    transformers = pytest.importorskip("transformers")
    callback = mhc_compile.integrations.StabilityCallback(every=2, file=tmp_path / "stability.jsonl")
    assert isinstance(callback, transformers.TrainerCallback)
    watched = trainer(tmp_path, [callback])
    with_callback = losses(watched)
    torch._dynamo.reset()
    assert with_callback == losses(trainer(tmp_path, []))
    assert [step for step, _ in callback.history] == [1, 2, 4]
    assert len(callback.history[0][1].sites) == 2
    assert len((tmp_path / "stability.jsonl").read_text().splitlines()) == 3
    assert callback._meter is None  # closed with the training


def test_a_batch_is_taken_out_of_a_loader_that_stays_where_it_is():
    from mhc_compile.inspection.stream_stats.measure import first_batch

    loader = DataLoader(TensorDataset(torch.arange(6.0), torch.arange(6)), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    values, labels = first_batch(loader, 4)
    assert (values.tolist(), labels.tolist()) == ([0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(mhc_compile.MhcError, match=r"over Stream without advancing it.*batch="):
        first_batch(DataLoader(Stream()), 2)


# --- Lightning
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trainer_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = Noisy(), []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            loss = F.mse_loss(self(batch[0]), batch[1])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    def fit(callbacks):
        torch.manual_seed(0)
        task = Task()
        mhc_compile.attach(task, torch.zeros(2, 3))
        task.compile(backend="mhc", options=EAGER)
        data = DataLoader(TensorDataset(torch.randn(12, 3), torch.randn(12, 3)), batch_size=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_epochs=1, accelerator="cpu", precision="bf16-mixed", callbacks=callbacks, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            ).fit(task, data)  # fmt: skip
        return task.seen

    callback = mhc_compile.integrations.StabilityCallback(every=2)
    assert isinstance(callback, lightning.Callback)
    with_callback = fit([callback])
    torch._dynamo.reset()
    assert with_callback == fit([])
    assert len(with_callback) == 6
    assert [step for step, _ in callback.history] == [1, 2, 4, 6]
    assert {result.dtype for _, result in callback.history} == {"bfloat16"}
    assert callback.history[-1][1].summary()["distance"] > 0
