"""Threads, forks, spawned processes, workers of a DataLoader, several models and several backends:
each call computes the mHC that is written by hand, or says that it does not.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.builders import relative
from helpers.hand_written import Transformer, attached_state, stir, transformer_by_hand, values_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mhc_compile

if TYPE_CHECKING:
    from collections.abc import Callable

EAGER = {"inner_backend": "eager"}
#: Seconds that a thread or a process is waited for.
PATIENCE = 40


class Other(Transformer):
    """Code of its own: Dynamo compiles it apart from Transformer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 1.0


def attached(seed: int = 1, kind: type[Transformer] = Transformer) -> Transformer:
    """A model with hyper-connections whose streams differ; nothing is traced."""
    model = kind()
    mhc_compile.restore(model, attached_state(1), options=EAGER)
    stir(model, torch.Generator().manual_seed(seed))
    return model


def ids(batch: int = 2, length: int = 4) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) * 5 % 7


def by_hand(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        shift = 1.0 if isinstance(model, Other) else 0.0
        return transformer_by_hand(values_of(model), tokens, model.gain) + shift


def assert_mhc(out: Tensor, model: Transformer, tokens: Tensor) -> None:
    assert relative(out.detach(), by_hand(model, tokens)) < 1e-5


def heard(call: Callable[[], Tensor]) -> tuple[Tensor | None, list[str]]:
    """What a call returned, or None where it raised, and what it said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = call()
        except mhc_compile.MhcError as error:
            return None, [str(error)]
    return out, [str(w.message) for w in caught if issubclass(w.category, mhc_compile.MhcWarning)]


def test_the_models_here_differ_from_the_plain_one():
    model = attached()
    with torch.no_grad():
        plain = transformer_by_hand(values_of(model), ids(), model.gain, plain=True)
    assert relative(plain, by_hand(model, ids())) > 1e-2


# Threads


class Paused:
    """An inner compiler that stays in the midst of a compilation until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, graph_module, inputs):
        self.reached.set()
        assert self.go.wait(PATIENCE)
        return graph_module.forward


class InThread(threading.Thread):
    """A call in a thread of its own; `result()` returns or raises what the call did."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call, self.value, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:
            self.error = error

    def result(self) -> object:
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.value


@pytest.mark.parametrize("kind", [Transformer, pytest.param(Other, marks=pytest.mark.slow)])
def test_a_model_that_runs_while_another_thread_compiles(kind):
    """While a thread compiles, `torch.compiler.is_compiling()` holds in all of them."""
    running, compiled, paused = attached(1, kind), attached(2), Paused()
    assert_mhc(running(ids()), running, ids())  # Dynamo compiles in one thread at a time
    handle = torch.compile(compiled, backend="mhc", options={"inner_backend": paused})
    compiling = InThread(lambda: handle(ids()))
    assert paused.reached.wait(PATIENCE)
    try:
        assert torch.compiler.is_compiling()
        out = InThread(lambda: running(ids())).result()
    finally:
        paused.go.set()
    assert_mhc(out, running, ids())
    assert_mhc(compiling.result(), compiled, ids())


def test_a_plain_run_is_loud_while_another_thread_compiles():
    running, paused = attached(1), Paused()

    @torch.compiler.disable
    def untraced() -> Tensor:
        return running.forward(ids())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untraced()  # Dynamo compiles in one thread at a time
    handle = torch.compile(attached(2), backend="mhc", options={"inner_backend": paused})
    compiling = InThread(lambda: handle(ids()))
    assert paused.reached.wait(PATIENCE)
    try:
        out, messages = heard(lambda: InThread(untraced).result())
    finally:
        paused.go.set()
    compiling.result()
    assert messages or relative(out.detach(), by_hand(running, ids())) < 1e-5


def callable_in(way: str, model):
    if way == "in place":
        model.compile(backend="mhc", options=EAGER)
    return {
        "compiled": lambda: torch.compile(model, backend="mhc", options=EAGER),
        "aot_eager": lambda: torch.compile(model, backend="aot_eager"),
        "eager": lambda: mhc_compile.eager(model),
    }.get(way, lambda: model)()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "compiled", "aot_eager", "eager", "in place"])
@pytest.mark.parametrize("warm", [False, True])
def test_threads_that_call_one_model(way, warm):
    """With and without gradients, at several shapes, from the first call on."""
    model = attached()
    call = callable_in(way, model)
    if warm:
        assert_mhc(call(ids()), model, ids())
    barrier = threading.Barrier(4)

    def run(number: int) -> list[tuple[Tensor, Tensor]]:
        barrier.wait(PATIENCE)
        pairs = []
        with torch.set_grad_enabled(number % 2 == 0):
            for length in (4, 3 + number, 5):
                tokens = ids(2, length)
                pairs.append((call(tokens), tokens))
        return pairs

    for thread in [InThread(lambda number=number: run(number)) for number in range(4)]:
        for out, tokens in thread.result():
            assert_mhc(out, model, tokens)


@pytest.mark.parametrize("way", ["eager", "explain"])
def test_a_model_that_runs_while_another_thread_traces_it(way):
    """`mhc_compile.eager` and traces switch calls of compiled parts off for their own time."""
    model, paused = attached(), Paused()
    assert_mhc(model(ids()), model, ids())

    class Stops(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            out = model(tokens)
            stop()
            return out

    @torch.compiler.disable
    def stop() -> None:
        paused.reached.set()
        assert paused.go.wait(PATIENCE)

    around = Stops()
    around.model = model
    other = InThread(
        (lambda: mhc_compile.eager(around)(ids())) if way == "eager" else lambda: mhc_compile.explain(around, ids())
    )
    assert paused.reached.wait(PATIENCE)
    try:
        out, messages = heard(lambda: InThread(lambda: model(ids())).result())
    finally:
        paused.go.set()
    other.result()
    assert not messages
    assert_mhc(out, model, ids())


# Processes


def answer(connection, model: Transformer | None, how: Callable | None) -> None:
    """Send what the model computes in this process, and what it says."""
    torch.set_num_threads(1)  # a fork has no threads of OpenMP, and would wait for them
    out, messages = heard(lambda: (model if how is None else how)(ids()))
    connection.send((None if out is None else out.detach().tolist(), messages))


def ask(method: str, model: Transformer, how: Callable | None = None) -> tuple[Tensor, list[str]]:
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, model, how), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is seen
    assert mine.poll(PATIENCE)
    values, messages = mine.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0
    return torch.tensor(values), messages


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "compiled", "aot_eager", "eager", "in place"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_forked_process(way, warm):
    model = attached()
    call = callable_in(way, model)
    if warm:
        call(ids())
    out, messages = ask("fork", model, call)
    assert not messages
    assert_mhc(out, model, ids())
    assert_mhc(call(ids()), model, ids())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "in place", "eager"])
def test_a_spawned_process_gets_the_model_pickled(way):
    model = attached()
    if way == "in place":
        model.compile(backend="mhc", options=EAGER)
    out, messages = ask("spawn", model, mhc_compile.eager(model) if way == "eager" else None)
    assert not messages
    assert_mhc(out, model, ids())


class Features(Dataset):
    """Rows that a model has seen, as in the extraction of features by a frozen encoder."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model((ids(1, 3 + index % 2) + index) % 7)[0, :3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("warm", [False, True])
def test_workers_whose_dataset_calls_a_model(method, warm):
    model = attached()
    if warm:
        model(ids())
    dataset = Features(model)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context=method)
    rows = torch.cat(list(loader))
    want = torch.cat([by_hand(model, (ids(1, 3 + index % 2) + index) % 7)[:, :3] for index in range(4)])
    assert relative(rows, want) < 1e-5
    assert_mhc(model(ids()), model, ids())


# Several models, several backends


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 12])
def test_models_of_one_class_and_of_two(number):
    """12 are more than Dynamo keeps versions of."""
    models = [attached(seed, Other if seed % 3 == 0 else Transformer) for seed in range(number)]
    for tokens in (ids(), ids(3, 5)):
        for model in models:
            assert_mhc(model(tokens), model, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["mhc", "other"])
def test_a_model_compiled_by_two_backends(other, first):
    model = attached()
    ways = [
        torch.compile(model, backend="mhc", options=EAGER),
        torch.compile(model, backend=other),
    ][:: 1 if first == "mhc" else -1]
    for _ in range(2):
        for way in ways:
            assert_mhc(way(ids()), model, ids())
        stir(model, torch.Generator().manual_seed(9))
    for way in ways:
        way(ids()).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("first", ["mhc", pytest.param("other", marks=pytest.mark.slow)])
def test_a_plain_model_keeps_its_backend_next_to_one_with_hyper_connections(first):
    """Of one class: the compiled code of one must not run for the other."""
    model = attached()
    plain = mhc_compile.plain(copy.deepcopy(model))
    ways = [
        (torch.compile(model, backend="mhc", options=EAGER), model, False),
        (torch.compile(plain, backend="aot_eager"), model, True),
        (torch.compile(model, backend="aot_eager"), model, False),
    ][:: 1 if first == "mhc" else -1]
    for _ in range(2):
        for way, reference, is_plain in ways:
            with torch.no_grad():
                want = transformer_by_hand(values_of(reference), ids(), reference.gain, plain=is_plain)
            assert relative(way(ids()).detach(), want) < 1e-5
    assert not mhc_compile.connections(plain)


def test_one_function_over_two_models():
    first, second = attached(1), attached(2)

    def both(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = second(tokens)
        return first(tokens), target

    for backend, options in (("mhc", EAGER), ("eager", None)):
        torch._dynamo.reset()
        one, two = torch.compile(both, backend=backend, options=options)(ids())
        assert_mhc(one, first, ids())
        assert_mhc(two, second, ids())


# The next process


SECOND = """
import torch
import mhc_compile
from helpers.hand_written import Transformer

torch.manual_seed(0)
model = torch.compile(Transformer(), backend="mhc")
model(torch.arange(8).reshape(2, 4) % 7).sum().backward()
"""


@pytest.mark.slow
def test_the_next_process_compiles_no_cpp(tmp_path):
    """The thread that builds kernels and Inductor ask at once which vectors the machine has."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{tests}:{tests.parent}"}
    built = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", SECOND], env=environment, check=True)
        built.append({path.name for path in tmp_path.rglob("*.so")})
    assert built[0] == built[1]
    assert len(built[0]) > 5
