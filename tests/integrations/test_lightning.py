"""Lightning's Trainer: trains, saves, resumes."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Decoder
from torch.utils.data import DataLoader, TensorDataset

import mhc_compile

lightning = pytest.importorskip("lightning")
#: It replaces `torch.compile` for the whole process, and copies arguments: for these tests alone.
REPLACEMENT = torch.compile
torch.compile = inspect.unwrap(REPLACEMENT)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

EAGER = {"inner_backend": "eager"}
LAYERS = 1


@pytest.fixture(autouse=True)
def _replaced(monkeypatch):
    monkeypatch.setattr(torch, "compile", REPLACEMENT)


class Learner(lightning.LightningModule):
    """As in Lightning's documentation; nothing in it knows of hyper-connections."""

    def __init__(self, compiled: dict[str, Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        net = Decoder(layers=LAYERS)
        self.net = torch.compile(net, backend="mhc", options=compiled) if compiled else net
        self.losses: list[float] = []

    def training_step(self, batch, index):
        (ids,) = batch
        loss = F.cross_entropy(self.net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Resuming(Learner):
    """What a module adds so that its checkpoints can be resumed whether or not it has
    hyper-connections already.
    """

    def on_load_checkpoint(self, checkpoint):
        mhc_compile.restore(self, checkpoint["state_dict"])


def fit(module, folder, epochs: int, **settings):
    torch._dynamo.reset()
    ids = torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")],
    )
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=2), **settings)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_trains_saves_and_resumes(tmp_path):
    whole = Learner(EAGER)
    fit(whole, tmp_path, 2)
    saved = tmp_path / "epoch=0.ckpt"
    assert len(mhc_compile.connections(whole.net)) == 2 * LAYERS
    assert all(c.phi.any() for c in mhc_compile.connections(whole.net).values())

    with pytest.raises(
        RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*net\._orig_mod\.blocks\.0\.mhc\.attn"
    ):
        fit(Learner(EAGER), tmp_path / "bare", 2, ckpt_path=saved)

    ahead = Learner(EAGER)
    mhc_compile.attach(ahead.net, torch.zeros(2, 5, dtype=torch.long))
    for index, resumed in enumerate((Resuming(EAGER), ahead)):
        fit(resumed, tmp_path / str(index), 2, ckpt_path=saved)
        assert len(resumed.losses) == 4
        assert resumed.losses == whole.losses[4:]
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_compiled_lightning_module(tmp_path):
    """`torch.compile(module)`: Lightning compiles its steps as a whole."""
    whole, inner_backend = Learner(), Learner({"inner_backend": "aot_eager"})
    fit(torch.compile(whole, backend="mhc", options={"inner_backend": "aot_eager"}), tmp_path, 2)
    fit(inner_backend, tmp_path / "inner_backend", 2)
    assert len(mhc_compile.connections(whole)) == 2 * LAYERS
    assert whole.losses == pytest.approx(inner_backend.losses, rel=1e-5)
    resumed = Resuming()
    fit(
        torch.compile(resumed, backend="mhc", options={"inner_backend": "aot_eager"}),
        tmp_path / "resumed",
        2,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    assert resumed.losses == whole.losses[4:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
