"""Lists and copies of a model's parameters that were made before its hyper-connections."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from helpers.builders import Decoder, tokens
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mhc_compile

LIST = "is a list of"
COPY = "has a copy of the parameters of Decoder"


def compile_eagerly(model):
    return torch.compile(model, backend="mhc", options={"inner_backend": "eager"})


def train(model, *, steps=2, zero=None, clip=None, average=None):
    """A loop like users' own, where the first call comes after all preparations."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = compile_eagerly(model)
    for _ in range(steps):
        compiled(tokens()).square().mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(clip, 0.5)
        optimizer.step()
        if zero is not None:
            for p in zero:
                p.grad = None
        optimizer.zero_grad()
        if average is not None:
            average(model)


@pytest.fixture
def silent():
    """Warnings of this package are errors in tests already; inside Dynamo too, by name."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", mhc_compile.MhcWarning)
        yield
    assert not [str(one.message) for one in said if issubclass(one.category, mhc_compile.MhcWarning)]


@pytest.mark.parametrize("use", ["clip", pytest.param("zero", marks=pytest.mark.slow)])
def test_a_list_that_clips_or_zeroes(use):
    model = Decoder(layers=1)
    with pytest.warns(mhc_compile.MhcWarning, match=rf"`{use}` {LIST} 17 parameters of Decoder, made before"):
        train(model, **{use: [p for p in model.parameters() if p.requires_grad]})


@pytest.mark.slow
def test_a_list_of_some_parameters_that_clips():
    model = Decoder(layers=1)
    with pytest.warns(mhc_compile.MhcWarning, match=rf"`clip` {LIST} 12 parameters of Decoder"):
        train(model, clip=tuple(model.blocks.parameters()))


class Trainer:
    """Holds its model's parameters, as scripts with classes do."""

    def __init__(self, model):
        self.model = compile_eagerly(model)
        self.parameters = list(model.parameters())

    def fit(self):
        self.model(tokens()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)


def test_a_list_that_an_object_holds():
    with pytest.warns(mhc_compile.MhcWarning, match=rf"`self.parameters` {LIST} 17 "):
        Trainer(Decoder(layers=1)).fit()


@pytest.mark.usefixtures("silent")
def test_lists_for_optimizers():
    model = Decoder(layers=1)
    everything = list(model.parameters())
    first = list(model.blocks.parameters())
    optimizer = torch.optim.SGD(everything, lr=0.1)
    for _ in range(2):
        some = [*first, *model.head.parameters()]
        assert len(some) in {14, 20}
        compile_eagerly(model)(tokens()).square().mean().backward()
        optimizer.step()
    assert len(first) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("silent")
def test_lists_of_an_optimizer_and_of_attached_models():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, clip=optimizer.param_groups[0]["params"])
    mhc_compile.detach(model)
    mhc_compile.attach(model, tokens())
    train(model, clip=list(model.parameters()))


def test_the_search_leaves_no_variable_behind():
    """`frame.f_locals` keeps what it has read; a dict that somebody else holds stays whole."""
    model = Decoder(layers=1)
    given = locals()
    mhc_compile.attach(model, tokens())
    assert given["model"] is model


class ByList:
    """In the order of `parameters()`."""

    def __init__(self, model):
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def __call__(self, model):
        for average, p in zip(self.shadow, model.parameters(), strict=False):
            average.lerp_(p, 0.1)


class ByName:
    """Names that it does not know are left out."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def __call__(self, model):
        for name, p in model.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(p, 0.1)


class ByTwin:
    """With a copy of the model."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def __call__(self, model):
        for average, p in zip(self.module.state_dict().values(), model.state_dict().values(), strict=False):
            average.lerp_(p, 0.1)


class TwinInside(nn.Module):
    """With a copy of the model as its submodule."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)

    forward = ByTwin.__call__


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        pytest.param(ByList, "shadow", marks=pytest.mark.slow),
        (ByName, "shadow"),
        (ByTwin, "module"),
        pytest.param(TwinInside, "module", marks=pytest.mark.slow),
    ],
)
def test_averages_made_before(kind, held):
    model = Decoder(layers=1)
    average = kind(model)
    # By position, phi meets a parameter of another shape.
    refused = contextlib.nullcontext() if kind is ByName else pytest.raises(RuntimeError, match="size")
    warned = pytest.warns(mhc_compile.MhcWarning, match=rf"`average.{held}` {COPY} without its hyper-connections")
    with warned, refused:
        train(model, average=average)


@pytest.mark.slow
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", [ByList, ByName])
def test_averages_made_after(kind):
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens())
    average = kind(model)
    train(model, steps=1, average=average)
    want = dict(model.named_parameters())
    got = dict(zip(want, average.shadow, strict=True)) if kind is ByList else average.shadow
    assert got.keys() == want.keys()
    assert all((got[name] - want[name]).abs().max() < 0.1 for name in want)


@pytest.mark.slow
def test_a_frozen_copy():
    model = Decoder(layers=1)
    target = copy.deepcopy(model).requires_grad_(False)
    with pytest.warns(mhc_compile.MhcWarning, match=f"`target` {COPY}"):
        train(model)
    assert not mhc_compile.connections(target)


@pytest.mark.usefixtures("silent")
def test_other_models_of_the_class():
    model, teacher = Decoder(layers=1), Decoder(layers=1).requires_grad_(False)
    other = ByTwin(model)  # trained as well, later
    optimizer = torch.optim.SGD(other.module.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    train(model, average=lambda model: averaged.update_parameters(model))
    assert len(mhc_compile.connections(averaged.module)) == 2
    assert not mhc_compile.connections(teacher)
    assert not mhc_compile.connections(other.module)
    assert len(optimizer.param_groups[0]["params"]) == 17
