"""Plans: where the hyper-connections of a model belong, as a file."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.builders import LAYERS, Attention, Decoder, tokens, twin
from helpers.gates import scatter
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mhc_compile
from mhc_compile.errors import AttachError, PlanError

EAGER = {"inner_backend": "eager"}


class BrokenAttention(Attention):
    """A graph break in the middle of a branch: its site spans two graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Head(nn.Module):
    """A model around the one that was planned."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).tanh()


def stir(model: nn.Module) -> None:
    scatter(model, 0.5, add=True, generator=torch.Generator().manual_seed(3))


def layout(model: nn.Module) -> dict[str, object]:
    """Everything that attaching decides, by path, and the names of all parameters in order."""
    found = {
        path: (c.width, c.index, c.streams, c.mapping, c.read_out is not None, c.phi.dtype, c.bias.tolist())
        for path, c in mhc_compile.connections(model).items()
    }
    return {"connections": found, "parameters": [name for name, _ in model.named_parameters()]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"streams": 2, "mapping": "identity", "read_out": "learned"},
        {"overrides": {"blocks.1.*": {"mapping": "identity", "init_gain": 0.5}}},
        {"preset": "deepseek-v4", "init": "random", "init_gain": 0.1},
    ],
)
def test_a_planned_model_is_the_attached_one(options, tmp_path):
    model = Decoder()
    before = model.state_dict().keys()
    mhc_compile.plan(model, tokens(), options=options).save(tmp_path / "mhc.json")
    assert model.state_dict().keys() == before  # planning leaves no trace
    attached = twin(model)
    torch.manual_seed(0)
    mhc_compile.attach(attached, tokens(), options=options)
    torch.manual_seed(0)
    mhc_compile.attach(model, plan=tmp_path / "mhc.json")
    assert layout(model) == layout(attached)
    stir(model)
    stir(attached)
    want = torch.compile(attached, backend="mhc", options={**EAGER, **options})(tokens())
    assert torch.equal(torch.compile(model, backend="mhc", options={**EAGER, **options})(tokens()), want)
    assert mhc_compile.plan(model) == mhc_compile.Plan.load(tmp_path / "mhc.json")  # read off the model


def test_a_plan_of_an_earlier_version_keeps_its_speeds(tmp_path):
    """They were 1, and such plans do not contain them."""
    model, now = Decoder(), tmp_path / "mhc.json"
    mhc_compile.plan(model, tokens()).save(now)
    data = json.loads(now.read_text())
    assert data["models"][0]["options"].pop("gate_speed") == 32.0
    assert data["models"][0]["options"].pop("scale_speed") == 1 / 128
    now.write_text(json.dumps(data))
    mhc_compile.attach(model, plan=now)
    torch.compile(model, backend="mhc", options=EAGER)(tokens())  # with options that leave the speeds out
    scales = [connection.scale.tolist() for connection in mhc_compile.connections(model).values()]
    assert scales == [pytest.approx([0.01] * 3)] * len(scales)
    for connection in mhc_compile.connections(model).values():
        assert connection.speeds == {"bias": 1.0, "scale": 1.0}
    fresh = Decoder()
    mhc_compile.attach(fresh, tokens())
    for connection in mhc_compile.connections(fresh).values():
        assert connection.speeds == {"bias": 32.0, "scale": 1 / 128}


def test_a_plan_holds_for_every_model_around_the_planned_one():
    plan = mhc_compile.plan(Head(Decoder()), tokens())
    assert [model.kind for model in plan.models] == ["Decoder"]
    pair = nn.ModuleList([Head(Decoder()), Decoder()])
    found = mhc_compile.attach(pair, plan=plan)
    assert len(found) == 4 * LAYERS
    assert "0.body.blocks.0.mhc.attn" in found
    assert "1.blocks.0.mhc.attn" in found


def test_a_trainer_may_wrap_blocks_for_checkpointing():
    wrapped = Decoder()
    plain = twin(wrapped)
    for number, block in enumerate(wrapped.blocks):
        wrapped.blocks[number] = checkpoint_wrapper(block)
    mhc_compile.attach(wrapped, tokens())
    plan = mhc_compile.plan(wrapped)
    mhc_compile.attach(plain, plan=plan)
    assert plan == mhc_compile.plan(plain)
    assert plan.models[0].connections[0].path == "blocks.0.mhc.attn"
    mhc_compile.detach(wrapped)
    mhc_compile.attach(wrapped, plan=plan)
    assert layout(wrapped)["connections"].keys() == {
        name.replace(".mhc", "._checkpoint_wrapped_module.mhc") for name in mhc_compile.connections(plain)
    }


class Numbered(Decoder):
    """Its blocks are a dict by number, compiled one by one."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(dict(zip(names, self.blocks, strict=True)))
        for block in self.blocks.values():
            block.compile(backend="mhc", options=EAGER)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks[next(iter(self.blocks))](self.embed(tokens))


def test_a_dict_of_numbers_is_a_list_of_blocks():
    numbered, named = Numbered("01"), Numbered("ab")
    numbered(tokens())
    named(tokens())
    assert [c.index for c in mhc_compile.connections(numbered).values()] == [0, 1, 2, 3]
    assert [path.split(".")[1] for path in mhc_compile.connections(named)] == ["a", "a"]  # the one that was called


def test_a_branch_in_two_graphs():
    model = Decoder()
    for block in model.blocks:
        block.attn = BrokenAttention(8)
    attached = twin(model)
    mhc_compile.attach(attached, tokens())
    plan = mhc_compile.plan(attached)
    assert any(entry.started_by for entry in plan.models[0].connections)
    mhc_compile.attach(model, plan=mhc_compile.Plan.loads(plan.dumps()))
    stir(model)
    stir(attached)
    first, second = (torch.compile(m, backend="mhc", options=EAGER) for m in (model, attached))
    assert torch.equal(first(tokens()), second(tokens()))
    plain = twin(model)
    mhc_compile.detach(plain)
    assert not torch.allclose(first(tokens()), plain(tokens()))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": LAYERS + 1}, r"module 'blocks.2' \(Block\) is not in the plan"),
        ({"layers": LAYERS - 1}, r"module 'blocks.1' \(Block\) is missing from the model"),
        (
            {"width": 16},
            r"module 'blocks.0.norm1' is LayerNorm weight\[8\] bias\[8\] in the plan and LayerNorm weight\[16\]",
        ),
    ],
)
def test_a_plan_that_does_not_fit_names_the_module(other, words):
    model = Decoder(**other)
    with pytest.raises(AttachError, match=f"the plan does not fit Decoder: Decoder: {words}"):
        mhc_compile.attach(model, plan=mhc_compile.plan(Decoder(), tokens()))
    assert not mhc_compile.connections(model)


def test_another_vocabulary_fits():
    assert mhc_compile.attach(Decoder(vocabulary=20), plan=mhc_compile.plan(Decoder(), tokens()))


def test_a_model_of_another_class_does_not_fit():
    with pytest.raises(AttachError, match="no module of it is a Decoder"):
        mhc_compile.attach(nn.Linear(8, 8), plan=mhc_compile.plan(Decoder(), tokens()))


def test_options_that_contradict_the_plan():
    plan = mhc_compile.plan(Decoder(), tokens(), options={"streams": 2})
    with pytest.raises(PlanError, match="made with streams=2, and the options say streams=8"):
        mhc_compile.attach(Decoder(), plan=plan, options={"streams": 8})


def test_a_plan_and_inputs_are_too_much():
    with pytest.raises(AttachError, match="a plan or example inputs; got both"):
        mhc_compile.attach(Decoder(), tokens(), plan=mhc_compile.plan(Decoder(), tokens()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "it has no entry 'mhc_plan'"),
        ("PK", "it is no JSON"),
        ('{"mhc_plan": 99, "models": []}', "it has version 99"),
        ('{"mhc_plan": 1, "models": [{"class": "Net"}]}', "an entry is missing or wrong"),
    ],
)
def test_a_file_that_is_no_plan(content, words, tmp_path):
    (tmp_path / "file").write_text(content)
    with pytest.raises(PlanError, match=words):
        mhc_compile.attach(Decoder(), plan=tmp_path / "file")


def test_the_file_is_readable():
    text = mhc_compile.plan(Decoder(layers=12), tokens()).dumps()
    data = json.loads(text)
    assert data["models"][0]["structure"]["blocks"].keys() == {"", "0-11"}  # equal blocks once
    assert len(text.splitlines()) < 70
    assert '    {"path": "blocks.0.mhc.attn", "width": 8, "index": 0, "declared_by": ["blocks.0.attn"]},' in text


def test_a_model_without_sites_has_no_plan():
    with (
        pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"),
        pytest.raises(AttachError, match="no hyper"),
    ):
        mhc_compile.plan(nn.Linear(2, 2), torch.ones(1, 2))
