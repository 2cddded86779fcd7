"""Outputs, buffers, written inputs and original gradients of a rewritten model are kept."""

from __future__ import annotations

import pytest
import torch
from helpers.stream_interpreter import StreamInterpreter, record_expansions
from torch import fx, nn

import mhc_compile
from mhc_compile.capture.tensor_tree import cast
from mhc_compile.compilation.inner_compiler import run_eagerly
from mhc_compile.inspection.verification.comparison import differences, record_run
from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.check import check, preservation
from mhc_compile.tools.zoo.families.parts import FeedForward
from mhc_compile.tools.zoo.family import Family, per_layer

OPTIONS = {"streams": 3, "min_chain_length": 1}


class Graphs:
    """An inner compiler that runs each graph, or its definition, and counts the sites that run."""

    def __init__(self, expansions) -> None:
        self.expansions = expansions
        self.compiled = self.sites = 0
        self.cut = self.by_definition = False

    def __call__(self, graph_module: fx.GraphModule, inputs):
        self.compiled += 1
        bodies = [module.graph for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
        sites = sum(len(body.find_nodes(op="call_function", target=torch.ops.mhc.update.default)) for body in bodies)
        expansion = self.expansions.pop() if self.expansions else None
        assert bool(expansion and expansion.plan.sites) == bool(sites)
        eager = run_eagerly(graph_module)
        self.cut |= bool(expansion and expansion.cut)
        oracle = StreamInterpreter(graph_module, expansion).run if expansion and not expansion.cut else eager

        def run(*flat):
            self.sites += sites
            return oracle(*flat) if self.by_definition else eager(*flat)

        return run


@pytest.mark.zoo(runs={(2, "train"): True, (2, "eval"): False}, needs="torch")
def test_outputs_and_gradients_are_those_of_the_plain_model(family, layers, mode):
    """At the start. Then, at random parameters, those of the plain graph interpreted on streams."""
    model, args, kwargs = family.build(layers)
    model = model.train(mode == "train")
    with record_expansions() as expansions:
        graphs = Graphs(expansions)
        options = {**OPTIONS, "inner_backend": graphs}
        worst = preservation(family, (model, args, kwargs), options)
        expected = family.expected(layers, mode)
        assert graphs.sites == sum(expected.rewritten(OPTIONS["min_chain_length"]))
        assert max(one.relative for one in worst) <= family.tolerance, worst
        if not graphs.cut:
            assert_like_the_definition(family, (model, args, kwargs), options, graphs)


def assert_like_the_definition(family, case, options, graphs):
    model, args, kwargs = case
    if family.double:
        args, kwargs = cast(args, torch.float64), cast(kwargs, torch.float64)
    compiled = torch.compile(model, backend="mhc", options=options)
    for connection in mhc_compile.connections(model).values():
        for name, parameter in connection.named_parameters():
            nn.init.normal_(parameter, std=0.5 / connection.speeds.get(name, 1))
    # Some models set attributes in their first call, and are compiled again in the second.
    record_run(compiled, model, args, kwargs, differentiable_inputs=family.differentiable_inputs)
    buffers, before = [buffer.clone() for buffer in model.buffers()], graphs.compiled
    seen = []
    for graphs.by_definition in (False, True):
        seen.append(record_run(compiled, model, args, kwargs, differentiable_inputs=family.differentiable_inputs))
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)
    assert graphs.compiled == before
    # Some models (mamba) compute a part in float32, whatever their dtype.
    tolerance = family.tolerance if family.double else max(1e-3, family.tolerance)
    wrong = [one for one in differences(*seen, tolerance) if not one.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["resnet", "dit"])
def test_eval_mode_is_preserved(name):
    outcome = check(zoo.get(name), mode="eval")
    assert outcome.status == "ok"
    assert max(outcome.error_forward, outcome.error_gradients) <= 1e-5, outcome.message


def test_a_rewrite_that_changes_the_function_is_noticed():
    outcome = check(zoo.get("pre-norm"), options={"init": "random"})
    assert outcome.status == "deviates"
    assert outcome.error_forward > 1e-3
    assert "output deviates by" in outcome.message


class Drifting(nn.Module):
    """Another function under compilation: what a wrong rewrite would be."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.f = what, FeedForward()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        y = self.f(x)
        if torch.compiler.is_compiling():
            if self.what == "gradient":
                y = y + (self.f[1].bias - self.f[1].bias.detach()).sum()
            if self.what == "buffer":
                self.seen += 1
            if self.what == "output":
                y = y * 1.001
            if self.what == "undefined":
                y = y.where(y != y.max(), float("nan"))
            if self.what == "shape":
                y = y[:1]
        return y


@pytest.mark.parametrize(
    ("what", "worst"),
    [
        ("nothing", ""),
        ("undefined", "output"),
        ("gradient", "f.1.bias"),
        ("buffer", "seen"),
        ("output", "output"),
        ("shape", "output"),
    ],
)
def test_each_kind_of_difference_is_seen(what, worst):
    family = Family("drifting", lambda n: (Drifting(what), (torch.randn(2, 5, 16),), {}), per_layer())
    forward, gradient = preservation(family, family.build(1), {})
    if not worst:
        assert max(forward.relative, gradient.relative) < 1e-6
    elif what == "gradient":
        assert forward.relative < 1e-6
        assert (gradient.relative > 1e-4, gradient.name) == (True, worst)
    else:
        assert (forward.relative > 1e-4, forward.name) == (True, worst)


def test_a_model_without_numbers_proves_nothing():
    class Undefined(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("nan")

    family = Family("undefined", lambda n: (Undefined(4, 4), (torch.randn(2, 4),), {}), per_layer())
    outcome = check(family)
    assert outcome.status == "failed"
    assert "the plain model gives NaN in output" in outcome.message


def test_a_model_that_cannot_run_is_failed_and_not_raised():
    family = Family("broken", lambda n: (nn.Linear(3, 3), (torch.randn(2, 4),), {}), per_layer())
    outcome = check(family)
    assert outcome.status == "failed"
    assert "could not be traced" in outcome.message
