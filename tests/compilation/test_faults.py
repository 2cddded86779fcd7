"""What goes wrong around a model leaves it usable: no memory, a compiler that fails, threads that
compile and train at once.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from helpers.builders import Pair, Small, points, twin

import mhc_compile


def compile_(model, inner_backend="eager", **options):
    return torch.compile(model, backend="mhc", options={"inner_backend": inner_backend, **options})


# A compiler that fails


class Failing:
    """An inner compiler that fails the first time, or whenever its graph is run."""

    def __init__(self, error, *, later=False):
        self.error, self.later, self.calls = error, later, 0

    def __call__(self, graph_module, inputs):
        self.calls += 1
        if self.calls > 1:
            return graph_module.forward
        if self.later:
            return self.fail
        return self.fail()

    def fail(self, *args):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError("no memory"), marks=pytest.mark.slow),
        torch.OutOfMemoryError("no memory"),
        KeyboardInterrupt(),
    ],
)
def test_no_memory_while_compiling(error):
    model = Small()
    plain = twin(model)
    compiled = compile_(model, Failing(error))
    with pytest.raises((torch._dynamo.exc.BackendCompilerFailed, KeyboardInterrupt)):
        compiled(points())
    assert torch.allclose(model(points()), plain(points()), atol=1e-6)
    attached = mhc_compile.connections(model)
    assert list(attached) == list(Small.SITES)
    out = compiled(points())  # the same compiled model, once there is memory
    assert torch.allclose(out, plain(points()), atol=1e-6)
    out.sum().backward()
    assert all(connection.phi.grad is not None for connection in attached.values())
    assert mhc_compile.detach(model) == 2
    assert torch.equal(model(points()), plain(points()))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_no_memory_while_running():
    model = Small()
    plain = twin(model)
    failing = Failing(MemoryError("no memory"), later=True)
    compiled = compile_(model, failing)
    with pytest.raises(MemoryError, match="no memory"):
        compiled(points())
    torch._dynamo.reset()
    assert torch.allclose(compiled(points()), plain(points()), atol=1e-6)
    assert failing.calls == 2


@pytest.mark.slow
def test_an_attachment_that_stops_half_way_is_continued():
    """The second hyper-connection finds no memory.

    The limit is the process's own: torch itself rejects the allocation.
    """
    script = textwrap.dedent("""
        import resource, torch, mhc_compile, warnings
        from torch import nn

        WIDTH = 400_000  # phi has 154 MB, and its start as much while it is written

        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.down, self.up = nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH)
            def forward(self, x):
                return self.up(self.down(x))

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Wide(), Wide()
            def forward(self, x):
                x = x + self.first(x)
                return x + self.second(x)

        model, x = Block(), torch.ones(1, WIDTH)
        want = model(x).detach()
        mhc_compile.attach(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))  # loads what tracing loads
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, resource.RLIM_INFINITY))
        compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
        try:
            compiled(x)
        except Exception as error:
            print(type(error).__name__, "memory" in str(error))
        print(len(mhc_compile.connections(model)), torch.equal(model(x), want))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(torch.allclose(compiled(x), want, atol=1e-5), len(mhc_compile.connections(model)))
    """)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["BackendCompilerFailed True", "1 True", "True 2"], done.stdout + done.stderr


# Threads


class Other(Small):
    """Code of its own: Dynamo compiles it apart from Small."""

    def forward(self, x):
        return self.outwards(self.pair(torch.relu(self.inwards(x))))


def train(model, inner_backend, losses, barrier):
    try:
        # Not Adam: while another thread compiles, torch.compiler.is_compiling() is true here too,
        # and Adam then computes in another order.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        compiled = compile_(model, inner_backend)
        barrier.wait(60)
        for _ in range(4):
            optimizer.zero_grad()
            loss = compiled(points()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    except BaseException as error:
        losses.append(error)
        barrier.abort()


@pytest.mark.parametrize(
    ("kinds", "inner_backend"),
    [
        pytest.param((Small, Other), "eager", id="two classes, eager"),
        pytest.param((Small, Small), "aot_eager", id="one class, aot_eager"),
        pytest.param((Small, Small), "eager", id="one class, eager", marks=pytest.mark.slow),
        pytest.param((Small, Other), "aot_eager", id="two classes, aot_eager", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_threads_compile_and_train_at_once(kinds, inner_backend):
    """Each as if it were alone; the optimizers exist before the first call, so that parameters join
    them while another thread attaches.
    """
    models = [kind() for kind in kinds]
    want = []
    for model in map(twin, models):
        alone = []
        train(model, inner_backend, alone, threading.Barrier(1))
        want.append((alone, model))
    torch._dynamo.reset()
    got = [[] for _ in models]
    barrier = threading.Barrier(len(models))
    threads = [
        threading.Thread(target=train, args=(model, inner_backend, losses, barrier))
        for model, losses in zip(models, got, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    for model, losses, (alone, reference) in zip(models, got, want, strict=True):
        assert losses == alone
        mine, theirs = model.state_dict(), reference.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(model.get_submodule(site).phi.any() for site in Small.SITES)


def test_a_model_that_is_attached_during_another_one_s_step_is_not_forgotten():
    """A step looks through what waits for an optimizer.

    What is attached by another thread in the midst of that waits for the next step.
    """
    late = Small()
    late_optimizer = torch.optim.SGD(late.parameters(), lr=0.1)

    class Slow(Pair):
        armed = False

        def parameters(self, recurse=True):
            if self.armed:  # an optimizer looks for the neighbours of a hyper-connection
                self.armed = False
                thread = threading.Thread(target=mhc_compile.attach, args=(late, points()))
                thread.start()
                thread.join(60)
                assert not thread.is_alive()
            return super().parameters(recurse)

    model = Small()
    model.pair = Slow(8)
    mhc_compile.attach(model, points())
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if ".mhc." not in name], lr=0.1)
    compile_(model)(points()).sum().backward()
    model.pair.armed = True
    optimizer.step()
    assert not model.pair.armed
    compile_(late)(points()).sum().backward()
    late_optimizer.step()
    trained = {id(parameter) for group in late_optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in late.parameters()} == trained
