"""DistributedDataParallel: two processes with half of the batch each train as one does with all of
it.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers.builders import Decoder, tokens
from torch._dynamo import trace_rules
from torch.nn.parallel import DistributedDataParallel
from training import Recomputing, Spy, Wrapped, build, train

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
#: Three megabytes of parameters: Dynamo cuts the graph into several pieces at DDP's smallest
#: buckets.
SIZES = {"width": 128, "layers": 4}


def wrap(model, place, backend="mhc", options=None, **settings):
    """The model in DDP, compiled as a whole (`outside`) or in there (`inside`)."""
    settings = {"bucket_cap_mb": 1, **settings}
    if place == "outside":
        return torch.compile(DistributedDataParallel(model, **settings), backend=backend, options=options)
    return DistributedDataParallel(torch.compile(model, backend=backend, options=options), **settings)


@contextlib.contextmanager
def ddp_mode(mode):
    """Set how Dynamo treats DDP.

    Torch never takes back that the Python reducer has DDP's own forward traced in the whole
    process.
    """
    inlined = set(trace_rules.LEGACY_MOD_INLINELIST)
    try:
        with torch._dynamo.config.patch(optimize_ddp=mode):
            yield
    finally:
        trace_rules.LEGACY_MOD_INLINELIST.intersection_update(inlined)
        trace_rules.get_legacy_mod_inlinelist.cache_clear()


def compare(rank, places=("outside", "inside"), inner_backend=None, optimize=True, kind=Decoder, **settings):
    """Trains alone and in DDP, and returns into how many pieces each of `places` was cut, if no
    `inner_backend` compiles them.
    """
    model, start = build(**SIZES), build(**SIZES, kind=kind)
    want = train(torch.compile(model, backend="mhc", options={"inner_backend": inner_backend or "eager"}), model)
    pieces = []
    for place in places:
        torch._dynamo.reset()
        spy = Spy()
        model = copy.deepcopy(start)
        with ddp_mode(optimize):
            got = train(wrap(model, place, options={"inner_backend": inner_backend or spy}, **settings), model, rank, 2)
        got.assert_close(want)
        pieces.append(len(spy.graphs))
    return pieces


def test_training(ranks):
    for outside, inside in ranks.run(compare):
        assert outside >= 3
        assert inside >= 3


def late(rank):
    """The error of `attach` with a model in DDP, and check what is left of the model."""
    model = Decoder(layers=1)
    with pytest.raises(mhc_compile.errors.AttachError) as caught:
        mhc_compile.attach(DistributedDataParallel(model), tokens())
    assert not mhc_compile.connections(model)
    mhc_compile.attach(model, tokens())
    wrap(model, "inside", options=EAGER)(tokens()).sum().backward()
    assert model.blocks[0].mhc.mlp.phi.grad.any()
    return str(caught.value)


def test_attaching_too_late(ranks):
    for message in ranks.run(late):
        assert "mhc_compile.attach(model, inputs) first" in message
        assert "DistributedDataParallel" in message


def explained(rank):
    model = DistributedDataParallel(Decoder(**SIZES), bucket_cap_mb=1)
    graphs = mhc_compile.explain(model, tokens()).graphs
    return [[len(chain.sites) for chain in graph.chains] for graph in graphs]


def test_explain_looks_through_ddp(ranks):
    assert ranks.run(explained) == [[[2 * SIZES["layers"]]]] * 2


def pieces_of_another_backend(rank):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = Decoder(**SIZES)
    torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=counter)(tokens())
    return counter.frame_count


def test_other_backends_get_their_pieces(ranks):
    assert min(ranks.run(pieces_of_another_backend)) >= 3


def agreed(rank):
    model = build()
    return [(name, whole.sum().item()) for name, whole in model.named_parameters()]


def test_ranks_attach_the_same(ranks):
    first, second = ranks.run(agreed)
    assert first == second
    assert sum(".mhc." in name for name, _ in first) == 3 * 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
def test_fused_kernels_in_every_piece(ranks, inner_backend):
    for kernels in ranks.run(fused, inner_backend):
        assert kernels >= {"mhc::read", "mhc::step", "mhc::close"}


def fused(rank, inner_backend):
    compare(rank, inner_backend=inner_backend)
    model = build(**SIZES)
    call = wrap(model, "inside", options={"inner_backend": inner_backend})
    call(tokens())
    with torch.profiler.profile() as profile:
        call(tokens())
    return {event.key for event in profile.key_averages()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"static_graph": True, "places": ("inside",)}, True),
        ({"find_unused_parameters": True}, True),
        ({"gradient_as_bucket_view": True}, True),
        ({"optimize": False}, False),
        ({"optimize": "python_reducer"}, False),
    ],
)
def test_settings_of_ddp(ranks, settings, cut):
    for pieces in ranks.run(compare_with, settings):
        assert all(count >= 3 if cut else count == 1 for count in pieces)


def compare_with(rank, settings):
    return compare(rank, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Wrapped, Recomputing])
@pytest.mark.parametrize("inner_backend", [None, "aot_eager"])
def test_activation_checkpointing(ranks, kind, inner_backend):
    for pieces in ranks.run(compare, ("outside", "inside"), inner_backend, True, kind):
        assert inner_backend or min(pieces) >= 3


def accumulate(rank, place):
    """Two halves of every batch, of which the last is reduced."""
    model, same = build(), build()
    want = train(torch.compile(model, backend="mhc", options=EAGER), model)
    call = wrap(same, place, options=EAGER)
    ddp = call if isinstance(call, DistributedDataParallel) else call._orig_mod
    train(call, same, rank, 2, wrapper=ddp, micro=2).assert_close(want)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_gradient_accumulation(ranks, place):
    ranks.run(accumulate, place)


def save(rank, folder):
    """Train half of the steps in DDP and save model and optimizer, as rank 0 does."""
    model = build()
    call = wrap(model, "inside", options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(call, model, rank, 2, optimizer=optimizer, steps=range(5))
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "saved.pt")


def resume(rank, folder, parts):
    """Train the other half from a checkpoint."""
    model = Decoder(16, 3)
    mhc_compile.attach(model, tokens())
    state = torch.load(folder / "saved.pt")
    model.load_state_dict(state["model"])
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    call = DistributedDataParallel(compiled) if parts > 1 else compiled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    return train(call, model, rank, parts, optimizer=optimizer, steps=range(5, 10))


def alone(steps):
    model = build()
    call = torch.compile(model, backend="mhc", options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, train(call, model, optimizer=optimizer, steps=steps)


@pytest.mark.slow
def test_resumed_with_another_number_of_processes(ranks, tmp_path):
    _, _, want = alone(range(10))
    want.losses[:5] = []
    ranks.run(save, tmp_path)
    resume(0, tmp_path, 1).assert_close(want)
    model, optimizer, _ = alone(range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    for got in ranks.run(resume, tmp_path, 2):
        got.assert_close(want)
