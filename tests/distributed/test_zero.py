"""ZeroRedundancyOptimizer, built before the first call: it divides the parameters again."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Decoder, tokens
from helpers.gates import scatter
from torch.distributed.optim import ZeroRedundancyOptimizer

import mhc_compile

EAGER = {"inner_backend": "eager"}


def train(rank, attach_first, bucketed):
    """Return all parameters after three steps on this rank's half of the batch."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder()
    if attach_first:
        mhc_compile.attach(model, tokens(), options=EAGER)
    kind = torch.optim.AdamW if bucketed else torch.optim.SGD
    optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.05, parameters_as_bucket_view=bucketed)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens())
    scatter(model, 0.5, add=True, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        compiled(tokens()[rank : rank + 1]).square().mean().backward()
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("bucketed", [False, True])
def test_it_trains_as_one_built_after_attaching(ranks, bucketed):
    first, other = ranks.run(train, False, bucketed)
    ahead, _ = ranks.run(train, True, bucketed)
    assert first.keys() == ahead.keys()
    for name, value in ahead.items():
        assert torch.equal(first[name], other[name]), name
        assert torch.equal(first[name], value), name
