"""DistributedDataParallel: two processes with half of the batch each train as one does with all of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import build, train

#: Three megabytes of parameters: Dynamo cuts the graph into several pieces at DDP's smallest buckets.
SIZES = {"width": 128, "layers": 4}


class Spy:
    """An inner compiler that compiles nothing and counts the graphs that it gets."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module)
        return graph_module.forward


def in_regions(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)


def alone(options, wrap=None):
    model = build(**SIZES, wrap=wrap)
    return train(torch.compile(model, backend="mhc", options=options), model)


def together(rank, inner, place="outside", optimize=True, wrap=None, **settings):
    """What came of training, and the number of pieces that were compiled where `inner` is None."""
    spy = Spy()
    options = {"inner": inner or spy}
    model = build(**SIZES, wrap=wrap)
    settings = {"bucket_cap_mb": 1, **settings}
    if place == "outside":
        call = torch.compile(DistributedDataParallel(model, **settings), backend="mhc", options=options)
    else:
        call = DistributedDataParallel(torch.compile(model, backend="mhc", options=options), **settings)
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        return train(call, model, rank, 2), len(spy.graphs)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_ddp(ranks, place):
    want = alone({"inner": "eager"})
    for got, pieces in ranks.run(together, None, place):
        assert pieces >= 3
        got.assert_close(want)
