"""Tensor, sequence and pipeline parallelism: what works has the right numbers, and what does not
says so.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import Decoder, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from training import build, train

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
pytestmark = pytest.mark.slow


class Heads(nn.Module):
    """Attention whose projections are apart, so that they can be cut by heads."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Cuttable(Decoder):
    def __init__(self, width, layers):
        super().__init__(width, layers)
        for block in self.blocks:
            block.attn = Heads(width)


IN, OUT = ("attn.q", "attn.k", "attn.v", "mlp.0"), ("attn.out", "mlp.2")


def tensor_parallel(rank, inner_backend):
    model = build(kind=Cuttable)
    want = train(torch.compile(model, backend="mhc", options=EAGER), model)
    model = build(kind=Cuttable)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        plan = {name: ColwiseParallel() for name in IN} | {name: RowwiseParallel() for name in OUT}
        parallelize_module(block, mesh, plan)
    train(torch.compile(model, backend="mhc", options={"inner_backend": inner_backend}), model).assert_close(want)


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
def test_tensor_parallel(ranks, inner_backend):
    ranks.run(tensor_parallel, inner_backend)


def sequence_parallel(rank, local, ahead):
    model = build(kind=Cuttable) if ahead else Cuttable(16, 3)
    mesh = init_device_mesh("cpu", (2,))
    ends = RowwiseParallel(output_layouts=Shard(1), use_local_output=local)
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = {name: ColwiseParallel() for name in IN} | dict.fromkeys(OUT, ends)
    plan |= {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "attn": whole, "mlp": whole}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    cut = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=local)
    joined = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, {"blocks.0": cut, "norm": SequenceParallel(), "head": joined})
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"distributed over ranks with placements \(Shard\(dim=1\),\)"
    ):
        torch.compile(model, backend="mhc", options=EAGER)(tokens(4, 6))
    assert ahead or not mhc_compile.connections(model)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_sequence_parallel_is_rejected(ranks, local, ahead):
    ranks.run(sequence_parallel, local, ahead)


class Stage(nn.Module):
    """Half of a decoder."""

    def __init__(self, whole, first):
        super().__init__()
        half = len(whole.blocks) // 2
        self.embed = whole.embed if first else nn.Identity()
        self.blocks = whole.blocks[:half] if first else whole.blocks[half:]
        self.end = nn.Identity() if first else nn.Sequential(whole.norm, whole.head)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


def pipeline(rank):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    whole = build(layers=4)
    halves = Stage(whole, True), Stage(whole, False)
    # Compiled one after the other in one process, without a pipeline: the same model, as the
    # streams begin again with each graph.
    want = tokens(4)
    for half in halves:
        torch._dynamo.reset()
        want = torch.compile(half, backend="mhc", options=EAGER)(want).detach()
    torch._dynamo.reset()
    compiled = torch.compile(halves[rank], backend="mhc", options=EAGER)
    stage = PipelineStage(compiled, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2)
    with pytest.warns(mhc_compile.MhcWarning, match=rf"pipeline stage {rank} of 2: .* averaged where this stage ends"):
        got = schedule.step(*([tokens(4)] if rank == 0 else []))
    if rank == 1:
        torch.testing.assert_close(got, want)


def test_pipeline_stages_say_that_streams_end(ranks):
    ranks.run(pipeline)
