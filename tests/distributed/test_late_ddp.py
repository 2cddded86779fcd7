"""DDP in the order of a script that knows nothing of hyper-connections: model, DDP and optimizer
first, and the compiled call attaches. Two processes with half of the batch each train as one does
with all of it, from hyper-connections far from their start.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io

import pytest
import torch
import torch.distributed as dist
from helpers.builders import Decoder, tokens
from test_ddp import ddp_mode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training import Recomputing, train

import mhc_compile
import mhc_compile.errors
from mhc_compile.distributed import late_parameters

EAGER = {"inner_backend": "eager"}


class Broken(Decoder):
    """A decoder whose graph breaks between blocks: it attaches in several steps."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return self.head(self.norm(x))


def script(rank, place, options=EAGER, kind=Decoder, **settings):
    """The compiled model in DDP, the DDP and the optimizer; the one process has no DDP."""
    torch.manual_seed(1)
    model = kind(16, 2)
    model.register_buffer("rank", torch.tensor(rank))
    ddp = None
    if place == "inside":
        call = ddp = DistributedDataParallel(torch.compile(model, backend="mhc", options=options), **settings)
    elif place == "outside":
        ddp = DistributedDataParallel(model, **settings)
        call = torch.compile(ddp, backend="mhc", options=options)
    else:
        call = torch.compile(model, backend="mhc", options=options)
    model.rank.fill_(rank)  # a buffer that only DDP makes the same on every rank
    return model, call, ddp, torch.optim.SGD(call.parameters(), lr=0.1, momentum=0.9)


def compare(rank, places=("outside", "inside"), *, micro=1, optimize=True, before=None, inner="eager", **settings):
    kind = settings.pop("kind", Decoder)
    options = {"inner_backend": inner}
    shaken = {"micro": micro, "shake_after": 1}
    model, call, _, optimizer = script(rank, None, kind=kind)
    want = train(call, model, optimizer=optimizer, **shaken)
    assert len(mhc_compile.connections(model)) == 4
    for place in places:
        torch._dynamo.reset()
        with ddp_mode(optimize):
            model, call, ddp, optimizer = script(rank, place, options, kind, **settings)
            seen = set()
            if before == "hook":
                ddp.register_comm_hook(seen, record_and_reduce)
            elif before is not None:
                before(rank, call, ddp)
            got = train(call, model, rank, 2, optimizer=optimizer, wrapper=ddp, **shaken)
        got.assert_close(want)
        assert model.rank == 0
        assert before != "hook" or seen == {id(p) for p in model.parameters()}


def record_and_reduce(seen, bucket):
    seen.update(id(parameter) for parameter in bucket.parameters())
    return allreduce_hook(None, bucket)


@pytest.mark.slow
def test_training(ranks):
    ranks.run(compare)


def run(rank, settings):
    compare(rank, **settings)


def validate_on_one_rank(rank, call, ddp):
    """Rank 0 alone validates with the model inside DDP, as nanoGPT does before its first step."""
    if rank == 0:
        inner = ddp.module if call is ddp else torch.compile(ddp.module, backend="mhc", options=EAGER)
        with torch.no_grad():
            inner.eval()(tokens())
        inner.train()
        assert mhc_compile.connections(inner)


def validate_on_all(rank, call, ddp):
    with torch.no_grad():
        call.eval()(tokens())
    call.train()


def train_inside(rank, call, ddp):
    """The first call, with gradients, is not DDP's; the compiled code is used again in DDP."""
    inner = ddp.module if call is ddp else torch.compile(ddp.module, backend="mhc", options=EAGER)
    inner(tokens(2, 6)[:, :-1]).sum().backward()  # with the strides of a batch
    call.zero_grad()


def attach_inside(rank, call, ddp):
    """`attach` is called in time for the optimizer's sake, but after DDP."""
    mhc_compile.attach(ddp.module if call is ddp else call._orig_mod.module, tokens())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"micro": 2},
        {"micro": 2, "gradient_as_bucket_view": True, "kind": Broken},
        {"micro": 2, "find_unused_parameters": True},
        {"static_graph": True, "places": ("inside",)},
        {"optimize": False},
        {"before": "hook"},
        {"before": validate_on_one_rank},
        {"before": validate_on_one_rank, "kind": Broken},
        {"before": validate_on_all, "bucket_cap_mb": 0.001, "optimize": False},
        {"before": train_inside},
        {"before": train_inside, "optimize": False},
        {"before": attach_inside},
        {"kind": Broken},
        {"kind": Recomputing},
        {"inner": "aot_eager"},
        {"inner": "inductor"},
    ],
    ids=lambda settings: " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in settings.items()),
)
def test_settings_and_first_calls(ranks, settings):
    ranks.run(run, settings)


def random_start(rank, place):
    options = {**EAGER, "init": "random"}
    model, call, _, optimizer = script(rank, place, options)
    torch.manual_seed(100 + rank)
    trained = train(call, model, rank, 2, optimizer=optimizer, steps=range(2))
    return trained.parameters, torch.rand(1).item()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_random_starts_are_the_same_on_every_rank(ranks, place):
    (first, draw), (second, other) = ranks.run(random_start, place)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    phis = [value for name, value in first.items() if name.endswith("phi")]
    assert len(phis) == 4
    assert not any(torch.allclose(one, other) for i, one in enumerate(phis) for other in phis[:i])
    assert draw != other  # the generators of the ranks are as they were


def absent(rank):
    """What rank 0 says if rank 1 trains another model."""
    late_parameters.SOON = datetime.timedelta(seconds=0.2)
    late_parameters.LATEST = datetime.timedelta(seconds=0.3)
    _, call, _, _ = script(rank, "inside", broadcast_buffers=False)
    if rank == 1:
        return None
    with (
        pytest.warns(mhc_compile.MhcWarning, match=r"waited .* for ranks \[1\]"),
        pytest.raises(mhc_compile.errors.AttachError, match=r"rank 0 .* waited .* for ranks \[1\]"),
    ):
        call(tokens())
    return True


def differing(rank):
    _, call, _, _ = script(rank, "inside", {**EAGER, "streams": 2 + rank})
    with pytest.raises(
        mhc_compile.errors.AttachError,
        match=r"blocks.0.mhc.attn.phi', \[.*\] and \[.*\]. Expected the same on every rank",
    ):
        call(tokens())


@pytest.mark.slow
@pytest.mark.parametrize("task", [differing, absent])
def test_ranks_that_do_not_attach_the_same(ranks, task):
    ranks.run(task)


def copied(rank):
    """Copies that were made between attaching and training learn of the parameters, too."""
    _, _, ddp, _ = script(rank, "outside")
    with torch.no_grad():
        torch.compile(ddp, backend="mhc", options=EAGER)(tokens())
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    for twin in (copy.deepcopy(ddp), torch.load(file, weights_only=False), ddp):
        torch._dynamo.reset()
        torch.compile(twin, backend="mhc", options=EAGER)((tokens() + rank) % 11).sum().backward()
        gradient = twin.module.blocks[0].mhc.mlp.bias.grad
        mean = gradient.clone()
        dist.all_reduce(mean)
        assert gradient.any()
        assert torch.allclose(mean / 2, gradient)


@pytest.mark.slow
def test_copies(ranks):
    ranks.run(copied)


def refused(rank):
    """What is said where DDP cannot learn of parameters, and that nothing was attached."""
    said = {}
    for case in ("python_reducer", "hook", "frozen", "join"):
        torch._dynamo.reset()
        with ddp_mode("python_reducer" if case == "python_reducer" else True):
            model, call, ddp, _ = script(rank, "inside")
        if case == "hook":
            ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
        if case == "frozen":
            model.head.requires_grad_(False)
        with (
            ddp.join() if case == "join" else contextlib.nullcontext(),
            pytest.raises(mhc_compile.errors.AttachError) as caught,
        ):
            call(tokens())
        said[case] = str(caught.value)
        assert not mhc_compile.connections(model)
    return said


@pytest.mark.slow
def test_what_keeps_ddp_from_late_parameters(ranks):
    for said in ranks.run(refused):
        for part in ("python_reducer", "communication hook", "frozen", "join"):
            assert sum(part in message for message in said.values()) == 1, part
        assert all("mhc_compile.attach(model, inputs) first" in message for message in said.values())
        assert all("mhc run --plan" in message for message in said.values())
