"""Every pass, lift rule and step of the rewrite raises, once or always: no run is lost for it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Small, points, twin
from torch import nn

import mhc_compile
from mhc_compile.compilation import fallback, inner_compiler, pipeline, session
from mhc_compile.errors import MhcError, RewriteError
from mhc_compile.passes import transforms
from mhc_compile.passes.core.pass_base import Pass
from mhc_compile.passes.lifting.compound_rules import Dropped
from mhc_compile.passes.lifting.rules import _RULES
from mhc_compile.passes.planning import planner
from mhc_compile.passes.transforms.cast_reads import CastReads
from mhc_compile.passes.transforms.expand_streams import ExpandStreams
from mhc_compile.passes.transforms.lazy_streams import LazyStreams

#: Passes that the backend does not run, but `mhc_compile.rewrite` of programs does.
FOR_PROGRAMS = {"lower-operators", "canonicalize-aten", "recompose-layer-norms"}


#: Passes that the inner compiler runs, over graphs of forward and backward together.
JOINT = (CastReads, LazyStreams)


def passes() -> list[type[Pass]]:
    for module in pkgutil.iter_modules(transforms.__path__, f"{transforms.__name__}."):
        importlib.import_module(module.name)
    return sorted(Pass.__subclasses__(), key=lambda kind: kind.__name__)


PASSES = [(kind, "apply") for kind in passes() if kind.__module__.startswith("mhc_compile.")]
RULES = [(type(rule), method) for rule in _RULES for method in ("axis", "emit")]
STEPS = [
    (session, "normalize"),
    (session, "analyze_boundary"),
    (fallback, "expand_plan"),
    (planner, "find"),
    (planner, "plan_chains"),
    (pipeline, "prepare_kernels"),
    (inner_compiler, "fuse"),
]


class Net(nn.Module):
    """Three chains: with lifts of features on the last axis, of features on axis 1, and none."""

    class One(nn.ModuleList):
        def forward(self, x):
            x = F.dropout(torch.relu(x + self[0](x)), 0.3).transpose(0, 1)
            x = (x + self[1](x)).reshape(-1, 6).roll(1, 0)
            return x + self[2](x)

    class Two(nn.ModuleList):
        def forward(self, x):
            x = F.group_norm(x + self[0](x), 2)
            x = F.batch_norm(x + self[1](x), None, None, training=True)
            return x + self[2](x)

    class Three(nn.ModuleList):
        def forward(self, x):
            x = x + self[0](x)
            return x + self[1](x)

    def __init__(self):
        super().__init__()
        self.one = self.One(nn.Linear(6, 6) for _ in range(3))
        self.two = self.Two(nn.Conv1d(4, 4, 1) for _ in range(3))
        self.three = self.Three(nn.Linear(6, 6) for _ in range(2))
        self.inwards, self.outwards = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.inwards(self.one(x)).view(2, 4, 6)
        return self.three(self.outwards(self.two(x)))


class Injected(Exception):
    """The exception of a fault, unlike any that the product knows."""


class Injector:
    """Replaces an attribute by a function that raises: the first time, or always."""

    def __init__(self, monkeypatch, place, name, *, once):
        self.fired, self.patch, self.once = 0, monkeypatch, once
        self.original = getattr(place, name)
        users = [module for key, module in sys.modules.items() if key.startswith("mhc_compile.")]
        for user in [place, *(module for module in users if vars(module).get(name) is self.original)]:
            monkeypatch.setattr(user, name, self.wrapper())

    def wrapper(self):
        def call(*args, **kwargs):
            if self.fired and self.once:
                return self.original(*args, **kwargs)
            self.fired += 1
            raise Injected("a fault")

        return call


def run(model, x, **options):
    torch.manual_seed(1)
    settings = {"inner_backend": "aot_eager", "recompute": "block", **options}
    return torch.compile(model, backend="mhc", options=settings)(x)


def plain(model, x):
    torch.manual_seed(1)
    return twin(model)(x)


def warned(seen) -> list[str]:
    return [str(one.message) for one in seen if issubclass(one.category, mhc_compile.MhcWarning)]


def name(place, attribute) -> str:
    return f"{place.__name__.split('.')[-1]}.{attribute}"


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
@pytest.mark.parametrize(
    ("place", "attribute"), [*PASSES, *RULES, *STEPS], ids=[name(*fault) for fault in (*PASSES, *RULES, *STEPS)]
)
def test_no_fault_costs_the_run(place, attribute, once):
    model, x = Net(), torch.randn(2, 4, 6)
    want = plain(model, x)
    with pytest.MonkeyPatch.context() as patch:
        injector = Injector(patch, place, attribute, once=once)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = run(model, x, recompute="cheap" if place in JOINT else "block")
    if not injector.fired:
        assert place.name in FOR_PROGRAMS
        return
    assert torch.allclose(got, want, atol=1e-5)
    (message,) = warned(seen)
    assert "Injected: a fault" in message
    if attribute == "emit" and not once:  # the chains that the rule is not for are rewritten
        first, second = (place.__name__ in names for names in (FIRST, SECOND))
        assert first != second
        paths = mhc_compile.connections(model)
        assert set(paths) == {path for path in SITES if not path.startswith("one" if first else "two")}
    torch._dynamo.reset()
    assert torch.allclose(run(model, x), want, atol=1e-5)
    assert set(mhc_compile.connections(model)) == set(SITES)


FIRST, SECOND = ("AsWritten", "Permuted", "Reshaped", "Dropped", "Vmapped"), ("GroupNorm", "BatchNorm")
SITES = (
    *(f"one.mhc.{i}" for i in range(3)),
    *(f"two.mhc.{i}" for i in range(3)),
    *(f"three.mhc.{i}" for i in range(2)),
)


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
@pytest.mark.parametrize(
    ("place", "attribute"), [*PASSES, *RULES, *STEPS], ids=[name(*fault) for fault in (*PASSES, *RULES, *STEPS)]
)
def test_a_fault_is_an_error_with_strict_before_anything_is_attached(place, attribute, once):
    if getattr(place, "name", "") in FOR_PROGRAMS:
        return
    model, x = Net(), torch.randn(2, 4, 6)
    want = plain(model, x)
    with pytest.MonkeyPatch.context() as patch:
        Injector(patch, place, attribute, once=once)
        with pytest.raises(RewriteError, match="Injected: a fault"):
            run(model, x, strict=True, recompute="cheap" if place in JOINT else "block")
    assert (mhc_compile.connections(model) == {}) is (place not in JOINT)
    assert torch.allclose(run(model, x, strict=True), want, atol=1e-5)
    assert set(mhc_compile.connections(model)) == set(SITES)


def stir(model):
    for parameter in (p for path, p in model.named_parameters() if ".mhc." in path):
        nn.init.normal_(parameter, std=0.5)


def test_a_chain_that_fails_stays_plain_and_the_others_run_on_streams(monkeypatch, caplog):
    model, x = Net(), torch.randn(2, 4, 6)
    reference = twin(model)
    Injector(monkeypatch, Dropped, "emit", once=False)
    with pytest.warns(mhc_compile.MhcWarning, match=r"the chain one\.mhc\.0 to one\.mhc\.2: Injected: a fault"):
        run(model, x, inner_backend="eager")
    assert "Traceback" in caplog.text
    connections = mhc_compile.connections(model)
    assert set(connections) == {path for path in SITES if not path.startswith("one")}
    stir(model)
    torch.manual_seed(1)
    inner = reference.inwards(reference.one(x)).view(2, 4, 6).movedim(1, -1).unsqueeze(-2).expand(-1, -1, 4, -1)
    for i in range(3):
        inner = connections[f"two.mhc.{i}"](inner, lambda y, i=i: reference.two[i](y.movedim(-1, 1)).movedim(1, -1))
        if i == 0:
            inner = torch.stack([F.group_norm(y.movedim(-1, 1), 2).movedim(1, -1) for y in inner.unbind(-2)], -2)
        if i == 1:
            inner = F.batch_norm(inner.flatten(0, -2), None, None, training=True).view(inner.shape)
    streams = reference.outwards(inner.mean(-2).movedim(-1, 1)).unsqueeze(-2).expand(-1, -1, 4, -1)
    for i in range(2):
        streams = connections[f"three.mhc.{i}"](streams, reference.three[i])
    torch._dynamo.reset()
    with pytest.warns(mhc_compile.MhcWarning, match="Injected"):
        assert torch.allclose(run(model, x, inner_backend="eager"), streams.mean(-2), atol=1e-5)


@pytest.mark.parametrize("what", [ExpandStreams, "inner_backend"], ids=str)
def test_a_model_that_loses_its_streams_is_warned_of_at_every_compile(monkeypatch, what):
    """Its parameters have been trained: without streams it is another function."""
    model, x = Small(), points()
    want = twin(model)(x)
    mhc_compile.attach(model, x)
    stir(model)

    def failing(graph_module, inputs):
        if any(node.target is torch.ops.mhc.update.default for node in graph_module.graph.nodes):
            raise Injected("a fault")
        return graph_module.forward

    options = {"inner_backend": failing if what == "inner_backend" else "eager"}
    if what is ExpandStreams:
        Injector(monkeypatch, ExpandStreams, "apply", once=False)
    for _ in range(2):
        torch._dynamo.reset()
        with pytest.warns(mhc_compile.MhcWarning, match=r"2 of them have hyper-connections \(pair\.mhc\.first, "):
            assert torch.allclose(run(model, x, **options), want)
    with pytest.raises(RewriteError, match="another function"):
        run(model, x, strict=True, **options)


def test_what_fails_without_streams_too_is_raised_as_it_is():
    def failing(graph_module, inputs):
        raise Injected("not the rewrite's")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Injected: not the rewrite's"):
        run(Small(), points(), inner_backend=failing)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        run(Small(), points(), inner_backend=failing, strict=True)


def test_an_attach_reports_a_fault(monkeypatch):
    model, x = Net(), torch.randn(2, 4, 6)
    Injector(monkeypatch, Dropped, "emit", once=False)
    with pytest.warns(mhc_compile.MhcWarning, match=r"one\.mhc\.0 to one\.mhc\.2: Injected"):
        assert not any(path.startswith("one") for path in mhc_compile.attach(model, x))
    mhc_compile.detach(model)
    with pytest.raises(MhcError, match="Injected"):
        mhc_compile.attach(model, x, options={"strict": True})
    assert mhc_compile.connections(model) == {}
