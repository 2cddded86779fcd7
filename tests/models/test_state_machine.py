"""Random sequences of what people do to a model: after every step, every way of calling it computes
the hand-written mHC of the parameters that it has now, or says in that call that it does not.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from helpers.builders import relative
from helpers.hand_written import (
    BRANCHES,
    TRACED,
    UNTRACED,
    Int8Linear,
    Transformer,
    attached_state,
    stir,
    transformer_by_hand,
    values_of,
)
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import mhc_compile
from mhc_compile import MhcError, MhcWarning

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
RATE = 0.05
#: Ways of calling that are kept at a time, next to the model itself.
KEPT = 2


@dataclass
class Record:
    """What a run has seen, over all its sequences."""

    sequences: int = 0
    steps: Counter = field(default_factory=Counter)
    #: How often a call in this way was ("mhc" | "plain" | "neither" | "raised", loud or not).
    outcomes: Counter = field(default_factory=Counter)
    #: By rule, way and outcome, one message that was seen.
    messages: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def table(self) -> str:
        rows = [f"{self.sequences} sequences, {sum(self.steps.values())} steps: {dict(self.steps)}", str(self.outcomes)]
        for (rule_name, way, outcome), message in sorted(self.messages.items()):
            rows.append(f"{rule_name} | {way} | {outcome} | {message}")
        return "\n".join(rows)


record = Record()


@contextlib.contextmanager
def heard():
    """The messages of the `MhcWarning`s in this context."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MhcWarning)
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, MhcWarning)]


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.embed.weight.dtype


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
}


class CallsOfAModel(RuleBasedStateMachine):
    """One model, the ways of calling it that are kept, and everything that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        torch.manual_seed(0)
        record.sequences += 1
        self.patches = contextlib.ExitStack()
        self.generator = torch.Generator().manual_seed(7)
        self.rule, self.context, self.contexts = "start", contextlib.nullcontext, "grad"
        self.ways: dict[str, object] = {}
        #: Ways and contexts that have warned since the model last changed.
        self.excused: set[tuple[str, str]] = set()
        #: Models whose plain runs were reported, which happens once for each cause.
        self.reported: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        #: Those with a block that Dynamo compiles no more. Its adds are plain, others need not be.
        self.limited: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.options: dict[str, object] = {"inner_backend": "eager"}
        self.tokens = self.ids(2, 4)

    def teardown(self) -> None:
        self.patches.close()
        torch._dynamo.reset()

    # The model

    @initialize(
        layers=st.sampled_from([1, 1, 1, 2]),
        start=st.sampled_from(["restored", "restored", "restored", "attached", "plain", "compiled", "in place"]),
        untraced=st.sampled_from([(), (), (), ("attn",), ("mlp",), ("attn", "mlp")]),
        inner_backend=st.sampled_from(["eager", "eager", "eager", "aot_eager"]),
    )
    def begin(self, layers, start, untraced, inner_backend):
        self.options = {"inner_backend": inner_backend}
        self.model = Transformer(layers)
        for name in untraced:
            self.exchange(self.model.blocks[0], name)
        self.adopt(self.model)
        self.saved = copy.deepcopy(self.model.state_dict())
        self.rule = f"start {start}" + (f", untraced {' and '.join(untraced)}" if untraced else "")
        with self.loudly():
            if start == "attached":
                mhc_compile.attach(self.model, self.tokens, options=self.options)
            elif start == "restored":
                mhc_compile.restore(self.model, attached_state(layers), options=self.options)
            elif start == "compiled":
                self.ways["compiled"] = torch.compile(self.model, backend="mhc", options=self.options)
                self.ways["compiled"](self.tokens)
            elif start == "in place":
                self.model.compile(backend="mhc", options=self.options)
                self.model(self.tokens)
        stir(self.model, self.generator)
        if self.attached:
            self.saved = copy.deepcopy(self.model.state_dict())

    def adopt(self, model: nn.Module) -> None:
        """Go on with this model; ways of calling another one end."""
        if model is not getattr(self, "model", None):
            self.ways.clear()
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    @property
    def attached(self) -> bool:
        return bool(mhc_compile.connections(self.model))

    @property
    def untraced(self) -> bool:
        return any(type(getattr(block, name)) in TRACED for block in self.model.blocks for name in BRANCHES)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(0, 7, shape, generator=self.generator)

    @staticmethod
    def exchange(block: nn.Module, name: str) -> None:
        """Replace a branch by one that Dynamo does not trace, or undo that."""
        old = getattr(block, name)
        new = {**UNTRACED, **TRACED}[type(old)]()
        for child, module in old.named_children():
            setattr(new, child, module)
        setattr(block, name, new.train(old.training))

    # What is checked

    @contextlib.contextmanager
    def loudly(self, *more: type[Exception]):
        """Record what the step itself says. Errors of this package, and `more`, end it."""
        outcome, said = "warned", []
        try:
            with heard() as messages:
                yield
        except (MhcError, *more) as error:
            outcome, said = "raised", [f"{type(error).__name__}: {error}"]
        for message in (*said, *messages):
            record.messages[self.rule, "the step itself", outcome] = message

    def by_hand(self, model: nn.Module | None = None, *, plain: bool = False) -> Tensor:
        model = self.model if model is None else model
        with torch.no_grad():
            return transformer_by_hand(values_of(model), self.tokens, model.gain, plain=plain)

    def call(self, name: str, way, model: nn.Module | None = None) -> Tensor | None:
        """Call in this way. Return the output if it is mHC, None if the call raised or warned."""
        model = self.model if model is None else model
        key = (name, self.contexts)
        try:
            with heard() as messages, self.context():
                out = way(self.tokens)
        except MhcError as error:
            self.note(name, "raised", [f"{type(error).__name__}: {error}"])
            return None
        tolerance = TOLERANCE[dtype_of(model)]
        wrong = relative(out.detach(), self.by_hand(model))
        if wrong <= tolerance:
            self.note(name, "mhc", messages)
            return out
        far = relative(out.detach(), self.by_hand(model, plain=True))
        self.note(name, "plain" if far <= tolerance else "neither", messages)
        if messages:
            self.excused.add(key)
        if any(message.startswith("residual adds of") for message in messages):
            self.reported.add(model)
            if any("its limit ends that" in message for message in messages):
                self.limited.add(model)
        excused = key in self.excused or model in self.limited
        assert excused or (model in self.reported and far <= tolerance), (
            f"after {self.rule!r}, {name!r} ({self.contexts}) is {wrong:.1e} from mHC and {far:.1e} from plain, silently"
        )
        return None

    def note(self, name: str, outcome: str, messages: list[str]) -> None:
        record.outcomes[name, outcome, "loud" if messages else "silent"] += 1
        for message in messages:
            record.messages[self.rule, f"{name} ({self.contexts})", outcome] = message

    @invariant()
    def every_way_is_mhc_or_loud(self):
        record.steps[self.rule] += 1
        for name, way in {"model": self.model, **self.ways}.items():
            self.call(name, way)
        self.context, self.contexts = contextlib.nullcontext, "grad"

    def changed(self) -> None:
        """What was said about the model before is no excuse any more."""
        self.excused.clear()

    def keep(self, name: str, way) -> None:
        self.ways.pop(name, None)
        while len(self.ways) >= KEPT:
            del self.ways[next(iter(self.ways))]
        self.ways[name] = way
        self.excused = {key for key in self.excused if key[0] != name}

    # Hyper-connections come, go and move

    @rule()
    def trace_and_attach(self):  # hypothesis likes the first name of the alphabet best, and a trace is dear
        self.rule = "attach"
        with self.loudly():
            mhc_compile.attach(self.model, self.tokens, options=self.options)
        self.changed()

    @rule()
    def detach(self):
        self.rule = "detach"
        mhc_compile.detach(self.model)
        self.changed()

    @rule()
    def stir(self):
        self.rule = "stir"
        stir(self.model, self.generator)

    @rule()
    def save(self):
        self.rule = "save"
        self.saved = copy.deepcopy(self.model.state_dict())

    @rule()
    def restore(self):
        self.rule = "restore"
        with self.loudly():
            mhc_compile.restore(self.model, self.saved, options=self.options)
        self.changed()

    @rule(strict=st.booleans(), ours=st.booleans())
    def load(self, strict, ours):
        self.rule = "mhc_compile.load_state_dict" if ours else f"load_state_dict, strict={strict}"
        with self.loudly(RuntimeError):  # as torch's own for what fits nowhere
            if ours:
                mhc_compile.load_state_dict(self.model, self.saved)
            else:
                self.model.load_state_dict(self.saved, strict=strict)
        self.changed()

    # Ways of calling

    @rule()
    def compile_outside(self):
        self.rule = "compile outside"
        self.keep("compiled", torch.compile(self.model, backend="mhc", options=self.options))

    @rule()
    def compile_in_place(self):
        self.rule = "compile in place"
        self.model.compile(backend="mhc", options=self.options)
        self.changed()

    @rule(other=st.sampled_from(["eager", "eager", "aot_eager"]))
    def compile_with_another_backend(self, other):
        self.rule = "another backend"
        self.keep(f"compiled by {other}", torch.compile(self.model, backend=other))

    @rule(other=st.sampled_from(["mhc", "eager"]), through=st.booleans())
    def compile_a_function_round_it(self, other, through):
        self.rule = "a compiled function round it"
        inner = self.ways.get("compiled", self.model) if through else self.model

        def function(tokens):
            return inner(tokens) * 1.0

        options = self.options if other == "mhc" else None
        self.keep(f"function by {other}", torch.compile(function, backend=other, options=options))

    @rule()
    def run_eagerly(self):
        self.rule = "eager"
        self.keep("eager(model)", mhc_compile.eager(self.model))

    @rule(name=st.sampled_from(sorted(CONTEXTS)))
    def call_in_a_context(self, name):
        self.rule, self.context, self.contexts = name, CONTEXTS[name], name

    @precondition(lambda self: not self.untraced)  # which torch.export rejects, in a plain model as well
    @rule()
    def export(self):
        self.rule = "export"
        self.call("exported", lambda tokens: torch.export.export(self.model, (tokens,)).module()(tokens))

    @precondition(lambda self: hasattr(mhc_compile, "plain"))
    @rule()
    def plain(self):
        self.rule = "plain"
        with heard() as messages:
            out = mhc_compile.plain(self.model)(self.tokens)
        assert not messages
        assert relative(out.detach(), self.by_hand(plain=True)) <= TOLERANCE[dtype_of(self.model)]

    @rule(factor=st.sampled_from([0.5, 1.25]))
    def functional_call(self, factor):
        self.rule = "functional_call"
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(factor)
        values = {name: parameter.detach() for name, parameter in other.named_parameters()}
        self.call("functional_call", lambda tokens: torch.func.functional_call(self.model, values, (tokens,)), other)

    @rule()
    def vmap(self):
        self.rule = "vmap"
        self.call("vmap", lambda tokens: torch.func.vmap(self.model)(tokens))

    @precondition(lambda self: not self.untraced)
    @rule()
    def trace(self):
        self.rule = "make_fx"
        self.call("make_fx", lambda tokens: make_fx(self.model)(tokens)(tokens))

    # Training

    @rule(data=st.data(), built=st.booleans())
    def train_step(self, data, built):
        """One step of gradient descent, compared with one of the hand-written model."""
        self.rule = "train step"
        name = data.draw(st.sampled_from(["model", *self.ways]))
        if built:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.step_through(name)

    def step_through(self, name: str) -> None:
        self.optimizer.zero_grad()
        out = self.call(name, {"model": self.model, **self.ways}[name])
        dtype = dtype_of(self.model)
        if out is None or not out.requires_grad:
            return
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
        (out.tanh() * weight).sum().backward()  # bounded, so that steps do not diverge
        values = {name: value for name, value in values_of(self.model).items() if value.requires_grad}
        want = transformer_by_hand({**values_of(self.model), **values}, self.tokens, self.model.gain)
        gradients = torch.autograd.grad((want.tanh() * weight).sum(), list(values.values()), allow_unused=True)
        with self.loudly():
            self.optimizer.step()
        if dtype not in GRADIENT_TOLERANCE:
            return
        floor = max(g.abs().max().item() for g in gradients if g is not None)
        for (path, before), gradient in zip(values.items(), gradients, strict=True):
            parameter = self.model.get_parameter(path)
            if gradient is None:
                continue
            assert parameter.grad is not None, f"{name!r} gave {path} no gradient"
            assert relative(parameter.grad, gradient, floor) <= GRADIENT_TOLERANCE[dtype], (
                f"{name!r}: gradient of {path}"
            )
            after = before.detach() - RATE * gradient
            assert relative(parameter.detach(), after, 1.0) <= GRADIENT_TOLERANCE[dtype], f"{name!r}: step of {path}"

    @rule(training=st.booleans())
    def mode(self, training):
        self.rule = "train()" if training else "eval()"
        self.model.train(training)

    @rule(part=st.sampled_from(["mhc", "attn", "embed", "norm"]), trained=st.booleans())
    def freeze(self, part, trained):
        self.rule = "unfreeze" if trained else "freeze"
        for name, parameter in self.model.named_parameters():
            if part in name and parameter.is_floating_point():
                parameter.requires_grad_(trained)

    # The model changes

    @rule(number=st.integers(0, 1), name=st.sampled_from(BRANCHES))
    def swap_a_branch(self, number, name):
        block = self.model.blocks[number % len(self.model.blocks)]
        self.rule = "swap for an untraced branch" if type(getattr(block, name)) in UNTRACED else "swap back"
        self.exchange(block, name)
        self.changed()

    @rule(name=st.sampled_from(BRANCHES))
    def quantise(self, name):
        self.rule = "quantise"
        for block in self.model.blocks:
            branch = getattr(block, name)
            for child, module in list(branch.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(branch, child, Int8Linear(module))
        self.changed()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype):
        self.rule = f"to {dtype}"
        self.model.to(dtype)
        self.changed()

    @rule(on=st.booleans())
    def deepcopy(self, on):
        self.rule = "deepcopy"
        other = copy.deepcopy(self.model)
        self.call("the copy", other, other)
        if on:
            self.adopt(other)
            self.changed()

    @rule(on=st.booleans())
    def pickled(self, on):
        self.rule = "pickle"
        other = pickle.loads(pickle.dumps(self.model))
        self.call("the unpickled", other, other)
        if on:
            self.adopt(other)
            self.changed()

    # Dynamo

    @rule()
    def reset(self):
        self.rule = "reset"
        torch._dynamo.reset()

    @rule(batch=st.integers(1, 3), length=st.integers(2, 6))
    def reshape(self, batch, length):
        self.rule = "another shape"
        self.tokens = self.ids(batch, length)

    @rule(gain=st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]))
    def vary_a_guard(self, gain):
        self.rule = "another guarded value"
        self.model.gain = gain
        self.changed()

    @rule(limit=st.integers(1, 3))
    def limit_recompilations(self, limit):
        self.rule = "recompile limit"
        self.patches.enter_context(torch._dynamo.config.patch(recompile_limit=limit))


def run(examples: int, steps: int, start: int | None = None, phases=(Phase.generate,)) -> Record:
    """Run this many sequences: always the same ones, or those of a seed."""
    global record
    record = Record()
    machine = CallsOfAModel if start is None else seed(start)(CallsOfAModel)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=phases,
            derandomize=start is None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return record


def replay(start: dict, *steps: tuple[str, dict]) -> CallsOfAModel:
    """Run one sequence; every way is checked after every step."""
    machine = CallsOfAModel()
    try:
        machine.begin(**{"layers": 1, "start": "restored", "untraced": (), "inner_backend": "eager", **start})
        machine.every_way_is_mhc_or_loud()
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.every_way_is_mhc_or_loud()
    finally:
        machine.teardown()
    return machine


ANOTHER = ("compile_with_another_backend", {"other": "eager"})
#: Sequences that were silently plain, or raised an error of torch, by what was wrong.
FOUND = {
    "a version compiled of the plain model ran on after attach": (
        {"start": "plain"},
        [ANOTHER, ("trace_and_attach", {}), ("stir", {})],
    ),
    "a version compiled after detach ran on after restore": (
        {},
        [ANOTHER, ("save", {}), ("detach", {}), ("restore", {})],
    ),
    "a function compiled round the plain model ran on after attach": (
        {"start": "plain"},
        [("compile_a_function_round_it", {"other": "eager", "through": False}), ("trace_and_attach", {}), ("stir", {})],
    ),
    "the second of two equivalent blocks has a branch swapped": (
        {"layers": 2},
        [("swap_a_branch", {"name": "mlp", "number": 1}), ("swap_a_branch", {"name": "mlp", "number": 0})],
    ),
    "a limit of one version, which is lowered to that after two were compiled": (
        {"untraced": ("attn",), "layers": 2, "start": "in place"},
        [
            ("limit_recompilations", {"limit": 1}),
            ("quantise", {"name": "attn"}),
            ("swap_a_branch", {"name": "attn", "number": 0}),
            ("swap_a_branch", {"name": "attn", "number": 1}),
        ],
    ),
    "streams that differ, when a split branch is attached at its start": (
        {"untraced": ("mlp",), "start": "in place"},
        [("detach", {}), ("load", {"ours": False, "strict": True})],
    ),
    "another backend compiled the code after a branch without streams": (
        {"untraced": ("mlp",)},
        [("detach", {}), ("compile_with_another_backend", {"other": "eager"}), ("restore", {})],
    ),
    "sym_size has no rule for vmap": ({}, [("vmap", {})]),
    "sym_size has no rule for vmap, of a quantised model": ({}, [("quantise", {"name": "mlp"}), ("vmap", {})]),
    "code between two graphs computed with stand-ins under vmap": (
        {"start": "attached", "untraced": ("attn",)},
        [("vmap", {})],
    ),
    "a child of an untraced branch is replaced, and another shape is traced": (
        {"start": "attached", "untraced": ("mlp",)},
        [("quantise", {"name": "mlp"}), ("reshape", {"batch": 3, "length": 3})],
    ),
    "a child of an untraced branch is replaced in a model that is compiled in place, and the model copied": (
        {"start": "in place", "untraced": ("mlp",)},
        [("quantise", {"name": "mlp"}), ("deepcopy", {"on": False})],
    ),
    "vmap of a model whose frame Dynamo has given up for another backend": (
        {"start": "attached", "untraced": ("attn",)},
        [ANOTHER, ("vmap", {}), ("vmap", {})],
    ),
}
CHEAP = "a version compiled after detach ran on after restore"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == CHEAP else pytest.mark.slow) for name in FOUND]
)
def test_a_sequence_that_was_wrong(name):
    start, steps = FOUND[name]
    replay(start, *steps)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_random_sequences():
    seen = run(2, 6)
    assert seen.sequences >= 2


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100))  # a sequence takes a second or two
def test_many_random_sequences(start, request):
    seen = run(20, 8, start)
    if request.config.option.verbose > 0:
        print(seen.table())
    assert seen.sequences >= 20
    assert seen.outcomes["model", "mhc", "silent"] > 100


def test_the_oracle_tells_mhc_from_plain():
    """Otherwise a plain run would pass for mHC."""
    machine = CallsOfAModel()
    machine.begin(1, "restored", (), "eager")
    want, plain = machine.by_hand(), machine.by_hand(plain=True)
    assert relative(plain, want) > 2 * TOLERANCE[torch.bfloat16]
    out = machine.call("compiled", torch.compile(machine.model, backend="mhc", options=machine.options))
    assert out is not None
    with pytest.raises(AssertionError, match="silently"):
        machine.call("by hand", lambda _: plain)
