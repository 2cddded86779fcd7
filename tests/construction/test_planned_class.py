"""Models that have hyper-connections from construction on."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from helpers.builders import LAYERS, Block, Decoder, tokens
from helpers.gates import scatter
from torch import nn

import mhc_compile
from mhc_compile import Options
from mhc_compile.compilation.pipeline import run_on_streams
from mhc_compile.errors import AttachError, PlanError

EAGER = {"inner_backend": "eager"}


class Planned(Decoder):
    """A decoder that samples; its tower can be called by itself."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__(layers=layers)

    @torch.no_grad()
    def generate(self, start: torch.Tensor, length: int) -> torch.Tensor:
        for _ in range(length):
            start = torch.cat([start, self(start)[:, -1:].argmax(-1)], 1)
        return start


class Later(Planned):
    """A class whose constructor goes on after that of the planned one."""


class Towers(nn.Module):
    """Two towers, each called by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Planned(), Planned()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(Planned, "__init__", Planned.__init__)  # put back afterwards
    return mhc_compile.planned(mhc_compile.plan(Planned(), tokens()), options=EAGER)(Planned)


def stirred(model: nn.Module) -> nn.Module:
    scatter(model, 0.7, add=True, generator=torch.Generator().manual_seed(3))
    return model


def test_parameters_exist_when_the_constructor_returns(planned):
    model = planned()
    assert len(mhc_compile.connections(model)) == 2 * LAYERS
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.compile(model, backend="mhc", options=EAGER)(tokens()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in optimizer.param_groups[0]["params"])
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_every_call_runs_on_streams(planned):
    model = stirred(planned()).eval()
    want = mhc_compile.eager(model, options=EAGER)(tokens())
    start = tokens()[:, :2]
    torch.testing.assert_close(model(tokens()), want)
    torch.testing.assert_close(torch.compile(model, backend="mhc", options=EAGER)(tokens()), want)
    torch.testing.assert_close(copy.deepcopy(model)(tokens()), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens()), want)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(tokens()), want)
    sampled = model.generate(start, 3)
    for length in range(2, 5):
        best = mhc_compile.eager(model, options=EAGER)(sampled[:, :length])[:, -1].argmax(-1)
        assert torch.equal(sampled[:, length], best)
    mhc_compile.detach(model)
    assert not torch.allclose(model(tokens()), want)


def test_a_part_that_a_method_calls_runs_on_streams(monkeypatch):
    monkeypatch.setattr(Towers, "__init__", Towers.__init__)
    towers = mhc_compile.planned(mhc_compile.plan(Towers(), tokens()), options=EAGER)(Towers)
    model = stirred(towers())
    want = mhc_compile.eager(model.left, options=EAGER)(tokens())
    torch.testing.assert_close(model.encode(tokens()), want)
    other = mhc_compile.eager(model.right, options=EAGER)(tokens())
    torch.testing.assert_close(model(tokens()), want + other)


def test_streams_do_not_leave_a_planned_model():
    """A discriminator sees its input, and not how a generator computed it."""
    x = torch.randn(2, 5, 8)
    first, second = nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8), Block(8))
    for model in (first, second):
        mhc_compile.attach(model, x)
        run_on_streams(stirred(model), Options.parse(EAGER), compiled=True)
    made = first(x)
    torch.testing.assert_close(made, mhc_compile.eager(first, options=EAGER)(x))
    torch.testing.assert_close(second(made), second(made.detach().clone()))


def test_a_model_of_a_class_of_torch_runs_on_streams():
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    mhc_compile.attach(model, plan=mhc_compile.plan(model, x))
    run_on_streams(stirred(model), Options.parse(EAGER), compiled=True)
    torch.testing.assert_close(model(x), mhc_compile.eager(model, options=EAGER)(x))


def test_checkpoints_load_strictly_and_exactly(planned):
    model = stirred(planned())
    other = planned()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()), model(tokens()))


def test_a_model_on_the_meta_device(planned):
    with torch.device("meta"):
        model = planned()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(mhc_compile.connections(model)) == 2 * LAYERS


def test_the_options_of_the_plan_hold_for_the_compiled_call(monkeypatch):
    monkeypatch.setattr(Planned, "__init__", Planned.__init__)
    options = {"streams": 2, "overrides": {"blocks.1.*": {"mapping": "identity"}}}
    plan = mhc_compile.plan(Planned(), tokens(), options=options)
    model = mhc_compile.planned(mhc_compile.Plan.loads(plan.dumps()), options=EAGER)(Planned)()
    found = mhc_compile.connections(model).values()
    assert [(connection.streams, connection.mapping) for connection in found] == [
        (2, "sinkhorn"), (2, "sinkhorn"), (2, "identity"), (2, "identity"),
    ]  # fmt: skip
    model(tokens())


def test_a_subclass_is_another_class(planned):
    assert not mhc_compile.connections(Later())


def test_a_dataclass_gets_its_constructor_after_it_was_planned():
    def define(decorate):
        @dataclasses.dataclass(eq=False)
        @decorate
        class Twice(nn.Module):
            width: int

            def __post_init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([Block(self.width), Block(self.width)])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.blocks[1](self.blocks[0](x))

        return Twice(width=8)

    plan = mhc_compile.plan(define(lambda kind: kind), torch.ones(1, 4, 8))
    assert len(mhc_compile.connections(define(mhc_compile.planned(plan, options=EAGER)))) == 4


def test_an_instance_that_does_not_fit_is_an_error(planned):
    with pytest.raises(AttachError, match=r"the plan does not fit this Planned: module 'blocks.2' \(Block\) is not"):
        planned(LAYERS + 1)


def test_a_plan_for_another_class_is_an_error():
    with pytest.raises(PlanError, match="the plan is for Decoder; got Planned"):
        mhc_compile.planned(mhc_compile.plan(Decoder(), tokens()))(Planned)
