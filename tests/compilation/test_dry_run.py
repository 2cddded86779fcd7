"""The dry run foresees what the backend does: the same graph, the same rejections, and a model that
stays as it is.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from helpers.builders import Decoder, tokens
from torch import nn

import mhc_compile
from mhc_compile.compilation.dry_run import dry_run
from mhc_compile.config.options import Options
from mhc_compile.passes import expand_plan
from mhc_compile.tools import zoo


def case(name):
    if name == "decoder":
        return Decoder(), (tokens(),), {}
    return zoo.get(name).build(2)


def operations(graph):
    """How often each operation occurs; inputs are counted, whatever their names."""
    return Counter(str(node.target) if node.op in {"call_function", "call_method"} else node.op for node in graph.nodes)


def foreseen(model, args, kwargs, **options):
    graphs = []

    def look(dry):
        graphs.append(operations(expand_plan(dry.session.graph, dry.session.plan, dry.bindings)))

    dry_run(model, args, kwargs, Options.parse(options), look)
    return graphs


def compiled(model, args, kwargs, **options):
    graphs = []

    def inner_backend(graph_module, inputs):
        graphs.append(operations(graph_module.graph))
        return graph_module.forward

    torch.compile(model, backend="mhc", options={**options, "inner_backend": inner_backend})(*args, **kwargs)
    return graphs


def insides(model):
    """Hooks and attributes of every module, without the mark that torch leaves on what it has
    traced.
    """
    return [
        (len(m._forward_pre_hooks), len(m._forward_hooks), sorted(set(vars(m)) - {"_is_torch_compile"}))
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    "name", ["decoder", "resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "swin"))]
)
def test_the_expanded_graph_has_the_operations_of_the_compiled_one(name):
    model, args, kwargs = case(name)
    before = foreseen(copy.deepcopy(model), args, kwargs, streams=3)
    assert sum(count for graph in before for op, count in graph.items() if "mhc" in op) > 0
    torch._dynamo.reset()
    assert before == compiled(model, args, kwargs, streams=3)


@pytest.mark.parametrize("name", ["decoder", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_nothing_of_the_model_changes(name):
    model, args, kwargs = case(name)
    state = {path: value.clone() for path, value in model.state_dict().items()}
    names = [path for path, _ in model.named_modules()]
    before = insides(model)
    random = torch.get_rng_state()
    assert foreseen(model, args, kwargs)
    assert [path for path, _ in model.named_modules()] == names
    assert insides(model) == before
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[path]) for path, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_second_dry_run_of_an_attached_model_foresees_the_same_graph():
    model = Decoder()
    before = foreseen(model, (tokens(),), {})
    mhc_compile.attach(model, tokens())
    torch._dynamo.reset()
    assert foreseen(model, (tokens(),), {}) == before


class TwoWidths(nn.Module):
    """One module that performs adds of two widths: its weights are made from what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, wide, narrow):
        for _ in range(2):
            wide, narrow = self.mix(wide), self.mix(narrow)
        return wide.sum() + narrow.sum()


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Tokens()

    def forward(self, x):
        return x + self.f(nn.functional.layer_norm(x, x.shape[-1:]))


class Tokens(nn.Module):
    """A product over the tokens, which serves any number of features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        return torch.relu(self.weight @ x)


def test_width_conflicts_are_rejected_as_the_rewrite_rejects_them():
    inputs = torch.randn(2, 4, 8), torch.randn(2, 4, 6)
    model = TwoWidths()
    rejections = []
    dry_run(
        model,
        inputs,
        {},
        Options().resolved,
        lambda dry: rejections.extend(str(rejection) for rejection in dry.session.plan.rejections),
    )
    assert any("width-conflict: mix.mhc.f has width 8, and this call needs 6" in rejection for rejection in rejections)
    before = foreseen(copy.deepcopy(model), inputs, {})
    torch._dynamo.reset()
    assert before == compiled(model, inputs, {})
    assert {connection.width for connection in mhc_compile.connections(model).values()} == {8}
