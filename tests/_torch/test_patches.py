"""Patches of torch: each is installed once, from however many threads."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._inductor.decomposition import decompositions
from torch.optim.swa_utils import AveragedModel

from mhc_compile._torch import distributed, inductor, optim


def in_threads(call) -> None:
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ddp_is_patched_when_the_backend_is_looked_up_and_not_on_import():
    script = (
        "from torch._dynamo.backends.distributed import DDPOptimizer as D; from torch._dynamo import lookup_backend\n"
        "import mhc_compile.backend, mhc_compile.eager_mode\n"
        "from mhc_compile._torch import distributed\n"
        "assert D.compile_fn is distributed._split\n"
        "lookup_backend('mhc')\n"
        "assert D.compile_fn is distributed._compile_whole"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_dynamo_is_loaded_at_the_first_use_of_a_name_and_not_on_import():
    """`mhc run` imports this room into scripts that may compile nothing."""
    script = (
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import mhc_compile.tools.launcher.activation\n"
        "from mhc_compile import _torch\n"
        "assert before == ('torch._dynamo' in sys.modules)\n"
        "assert not _torch.in_trace()\n"
        "assert 'torch._dynamo' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_ddp_is_patched_once(monkeypatch):
    monkeypatch.setattr(DDPOptimizer, "compile_fn", distributed._split)
    in_threads(distributed.rewrite_before_ddp_splits)
    assert DDPOptimizer.compile_fn is distributed._compile_whole


def test_ddp_leaves_other_backends_their_pieces(monkeypatch):
    pieces = []
    monkeypatch.setattr(distributed, "_split", lambda optimizer, graph, inputs: pieces.append(graph) or graph)

    def backend(graph_module, inputs):
        return ("whole", distributed._ddp_optimizer.get())

    optimizer = DDPOptimizer(1, backend, first_bucket_cap=1)
    assert distributed._compile_whole(optimizer, "graph", []) == "graph"
    assert pieces == ["graph"]
    backend.takes_whole_graphs = True
    assert distributed._compile_whole(optimizer, "graph", []) == ("whole", optimizer)
    assert distributed._ddp_optimizer.get() is None


def test_decompositions_are_registered_once(monkeypatch):
    cleared = []
    monkeypatch.setattr(inductor, "inductor_decompositions", table := dict(decompositions))
    monkeypatch.setattr(inductor.fast_random_decomps, "cache_clear", lambda: cleared.append(1), raising=False)
    monkeypatch.setattr(inductor, "make_fallback", lambda op, **_: cleared.append(op))
    function = {torch.ops.aten.add_.Tensor: torch.add} if torch.ops.aten.add_.Tensor not in table else {"op": torch.add}
    in_threads(lambda: inductor.register_decompositions(function))
    assert len(cleared) == 2
    assert function.items() <= table.items()


def test_a_hook_runs_once_before_each_average(monkeypatch):
    plain = inspect.unwrap(AveragedModel.update_parameters)
    monkeypatch.setattr(AveragedModel, "update_parameters", plain)
    model, seen = nn.Linear(1, 1), []

    def hook(averaged, model):
        seen.append(int(averaged.n_averaged))

    in_threads(lambda: optim.before_averaging(hook))
    averaged = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
    assert seen == [0, 1]
    assert AveragedModel.update_parameters.__wrapped__ is plain


def test_optimizers_are_patched_once(monkeypatch):
    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", inspect.unwrap(torch.optim.Optimizer.add_param_group))
    added = []

    def hook(optimizer, parameters):
        added.append(parameters)

    in_threads(lambda: optim.before_adding_group(hook))
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    other = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": (p for p in [other])})
    assert [[id(p) for p in parameters] for parameters in added] == [[id(weight)], [id(other)]]
    assert optimizer.param_groups[1]["params"] == [other]
