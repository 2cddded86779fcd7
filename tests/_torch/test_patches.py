"""Patches of torch: each is installed once, whoever calls and how often."""

from __future__ import annotations

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


def test_ddp_is_patched_once_for_each_backend(monkeypatch):
    monkeypatch.setattr(distributed, "_whole_graph_backends", [])
    monkeypatch.setattr(DDPOptimizer, "compile_fn", distributed._split)

    def backend(graph_module, inputs):
        return graph_module

    in_threads(lambda: distributed.rewrite_before_ddp_splits(backend))
    assert distributed._whole_graph_backends == [backend]
    assert DDPOptimizer.compile_fn is distributed._compile_whole


def test_ddp_leaves_other_backends_their_pieces(monkeypatch):
    pieces = []
    monkeypatch.setattr(distributed, "_split", lambda optimizer, graph, inputs: pieces.append(graph) or graph)

    def ours(graph_module, inputs):
        return ("whole", distributed._ddp_optimizer.get())

    optimizer = DDPOptimizer(1, ours, first_bucket_cap=1)
    monkeypatch.setattr(distributed, "_whole_graph_backends", [])
    assert distributed._compile_whole(optimizer, "graph", []) == "graph"
    assert pieces == ["graph"]
    monkeypatch.setattr(distributed, "_whole_graph_backends", [ours])
    assert distributed._compile_whole(optimizer, "graph", []) == ("whole", optimizer)
    assert distributed._ddp_optimizer.get() is None


def test_decompositions_are_registered_once(monkeypatch):
    cleared = []
    monkeypatch.setattr(inductor, "inductor_decompositions", table := dict(decompositions))
    monkeypatch.setattr(inductor.fast_random_decomps, "cache_clear", lambda: cleared.append(1), raising=False)
    monkeypatch.setattr("torch._inductor.lowering.make_fallback", lambda op, **_: cleared.append(op))
    function = {torch.ops.aten.add_.Tensor: torch.add} if torch.ops.aten.add_.Tensor not in table else {"op": torch.add}
    in_threads(lambda: inductor.register_decompositions(function))
    assert len(cleared) == 2
    assert function.items() <= table.items()


def test_a_hook_runs_once_before_each_average(monkeypatch):
    monkeypatch.setattr(optim, "_before_update", [])
    monkeypatch.setattr(AveragedModel, "update_parameters", optim._update)
    model, seen = nn.Linear(1, 1), []

    def hook(averaged, model):
        seen.append(int(averaged.n_averaged))

    in_threads(lambda: optim.before_averaging(hook))
    averaged = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
    assert seen == [0, 1]
    assert AveragedModel.update_parameters is optim._update_parameters
