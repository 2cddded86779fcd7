"""accelerate: trains, accumulates, saves its state and resumes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Decoder
from torch.utils.data import DataLoader, TensorDataset

import mhc_compile
import mhc_compile.integrations

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

EAGER = {"inner_backend": "eager"}
LAYERS = 1


def _forget():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """accelerate keeps its settings for the process, as a Trainer does for it; and DynamoBackend
    knows its own members alone at the start.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    _forget()
    hook = DynamoBackend.__dict__.get("_missing_")
    known = {
        name: DynamoBackend._value2member_map_.pop(name)
        for name in ("MHC",)
        if name in DynamoBackend._value2member_map_
    }
    if hook is not None:
        del DynamoBackend._missing_
    yield
    _forget()
    if hook is not None:
        DynamoBackend._missing_ = hook
    DynamoBackend._value2member_map_.update(known)


class Loop:
    """A loop as in accelerate's documentation; nothing in it knows of hyper-connections."""

    def __init__(self, accelerator: Accelerator, *, compiled: bool = False, attach: bool = False, restore=None) -> None:
        torch._dynamo.reset()
        torch.manual_seed(2)
        self.plain = Decoder(layers=LAYERS)
        self.accelerator = accelerator
        if attach:
            mhc_compile.attach(self.plain, torch.zeros(2, 5, dtype=torch.long))
        if restore:
            mhc_compile.restore(self.plain, restore)
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        ids = torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(1))
        model = torch.compile(self.plain, backend="mhc", options=EAGER) if compiled else self.plain
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            model, optimizer, scheduler, DataLoader(TensorDataset(ids), batch_size=2)
        )

    def train(self, first: int, last: int) -> list[float]:
        """Batches `first` to `last`, and the loss of each."""
        losses = []
        for index, (ids,) in enumerate(self.loader):
            if not first <= index < last:
                continue
            with self.accelerator.accumulate(self.model):
                logits = self.model(ids)[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def assert_equal(one: Loop, two: Loop) -> None:
    for name, value in one.plain.state_dict().items():
        assert torch.equal(value, two.plain.state_dict()[name]), name
    assert all(c.phi.any() for c in mhc_compile.connections(one.plain).values())
    assert len(mhc_compile.connections(one.plain)) == 2 * LAYERS


def test_state_is_saved_and_loaded(tmp_path):
    whole = Loop(Accelerator(cpu=True), compiled=True)
    losses = whole.train(0, 3)
    whole.accelerator.save_state(tmp_path)
    losses += whole.train(3, 6)
    # load_state is strict: it wants the hyper-connections there, and says so.
    bare = Loop(Accelerator(cpu=True), compiled=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*blocks\.0\.mhc\.attn"):
        bare.accelerator.load_state(tmp_path)
    for ahead in ({"attach": True}, {"restore": tmp_path}):
        half = Loop(Accelerator(cpu=True), compiled=True, **ahead)
        half.accelerator.load_state(tmp_path)
        assert half.train(3, 6) == losses[3:]
        assert_equal(half, whole)


@pytest.mark.slow
def test_backends_by_name():
    """accelerate has a list of its own; registered, torch's list counts."""
    for rejected in (lambda: Accelerator(cpu=True, dynamo_backend="mhc"), lambda: TorchDynamoPlugin(backend="mhc")):
        with pytest.raises(ValueError, match="'MHC' is not a valid DynamoBackend"):
            rejected()
    mhc_compile.integrations.register_with_accelerate()
    mhc_compile.integrations.register_with_accelerate()
    assert DynamoBackend("MHC") is DynamoBackend("MHC")
    assert DynamoBackend("INDUCTOR") is DynamoBackend.INDUCTOR
    with pytest.raises(ValueError, match="'MHCC' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="mhcc")
    plugin = TorchDynamoPlugin(backend="mhc", options={"inner_backend": "eager", "streams": 2})
    named, by_hand = Loop(Accelerator(cpu=True, dynamo_plugin=plugin)), None
    losses = named.train(0, 4)
    assert {c.streams for c in mhc_compile.connections(named.plain).values()} == {2}
    AcceleratorState._reset_state()
    by_hand = Loop(Accelerator(cpu=True))
    by_hand.model = torch.compile(by_hand.plain, backend="mhc", options={"inner_backend": "eager", "streams": 2})
    assert by_hand.train(0, 4) == losses
    assert_equal(named, by_hand)


@pytest.mark.slow
def test_accumulation_in_bfloat16(tmp_path):
    """Streams take part under autocast, coefficients stay in float32, and a resumed run goes on
    where the first one was.
    """

    def make(**ahead) -> Loop:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return Loop(
            Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2), compiled=False, **ahead
        )

    mhc_compile.integrations.register_with_accelerate()
    runs = []
    for compile_first in (True, False):
        loop = make()
        if not compile_first:  # the plain model, for what the streams must not change at the start
            runs.append(loop.train(0, 2))
            continue
        loop.model = torch.compile(loop.model, backend="mhc", options={"inner_backend": "aot_eager"})
        losses = loop.train(0, 4)
        runs.append(losses[:2])
        loop.accelerator.save_state(tmp_path)
        rest = loop.train(4, 8)
        resumed = make(restore=tmp_path)
        resumed.model = torch.compile(resumed.model, backend="mhc", options={"inner_backend": "aot_eager"})
        resumed.accelerator.load_state(tmp_path)
        assert resumed.train(4, 8) == rest
        assert_equal(resumed, loop)
        assert {p.dtype for p in resumed.plain.parameters()} == {torch.float32}
    assert runs[0] == pytest.approx(runs[1], rel=2e-2)
