"""FSDP2: two processes that each hold half of the parameters and see half of the batch train as one
process does with all of both.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers.builders import Decoder, tokens
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from training import Recomputing, Spy, Wrapped, build, train, whole

import mhc_compile
import mhc_compile.errors
from mhc_compile.distributed import fully_shard

#: Ways to compile: every block in place, every block as a module of its own, the sharded model as a
#: whole.
WAYS = ("method", "module", "whole")
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
#: Casts nothing, and yet hyper-connections get groups of their own.
APART = MixedPrecisionPolicy(param_dtype=torch.float32)


def compile_blocks(model, way, options):
    for i, block in enumerate(model.blocks):
        if way == "method":
            block.compile(backend="mhc", options=options)
        elif way == "module":
            model.blocks[i] = torch.compile(block, backend="mhc", options=options)


def shard(model, way, options, policy=None, apply=fully_shard):
    """Compiled as `way` says, sharded block by block, and ready to be called."""
    mesh = init_device_mesh("cpu", (2,))
    settings = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    compile_blocks(model, way, options)
    for block in model.blocks:
        apply(block, **settings)
    apply(model, **settings)
    return torch.compile(model, backend="mhc", options=options) if way == "whole" else model


def alone(inner_backend, kind=Decoder):
    """One process and one graph: streams that did not cross from block to block would give other
    numbers.
    """
    model = build(kind=kind)
    return train(torch.compile(model, backend="mhc", fullgraph=True, options={"inner_backend": inner_backend}), model)


def compare(rank, cases, inner_backend=None, kind=Decoder):
    """Trains alone and sharded, in every case (way, policy, function that shards)."""
    want = alone(inner_backend or "eager")
    for way, policy, apply in cases:
        torch._dynamo.reset()
        spy = Spy()
        model = build(kind=kind)
        got = train(shard(model, way, {"inner_backend": inner_backend or spy}, policy, apply), model, rank, 2)
        got.assert_close(want)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        bodies = [m for graph in spy.graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        operators = [str(node.target) for body in bodies for node in body.graph.nodes]
        assert inner_backend or operators.count("mhc.update.default") >= 2


def test_training(ranks):
    ranks.run(compare, [("method", APART, fully_shard), ("whole", None, torch_fully_shard)])


def dtypes(rank, way, apply):
    """dtypes with which parameters enter the compiled graphs: of hyper-connections, and of
    everything else.
    """
    spy = Spy()
    model = build()
    call = shard(model, way, {"inner_backend": spy}, BF16, apply)
    call(tokens()).sum().backward()
    seen = {True: set(), False: set()}
    for graph in spy.graphs:
        for node in graph.graph.find_nodes(op="placeholder"):
            if isinstance(node.meta["example_value"], torch.nn.Parameter):
                seen["mhc" in str(node.target)].add(node.meta["example_value"].dtype)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(connection.phi.grad.full_tensor().any() for connection in mhc_compile.connections(model).values())
    return seen[True], seen[False]


def test_coefficients_stay_in_float32(ranks):
    for own, rest in ranks.run(dtypes, "method", fully_shard):
        assert own == {torch.float32}
        assert rest == {torch.bfloat16}
    for own, _ in ranks.run(dtypes, "method", torch_fully_shard):
        assert own == {torch.bfloat16}  # this is what the other function is for


def late(rank):
    """Errors of models that were sharded before they were attached, and what is left of the
    models.
    """
    said = []
    for way in (*WAYS, "attach"):
        torch._dynamo.reset()
        model = Decoder()
        call = shard(model, way, {"inner_backend": "eager"})
        if way == "attach":
            call = lambda x, model=model: mhc_compile.attach(model, x)  # noqa: E731
        with pytest.raises(mhc_compile.errors.AttachError) as caught:
            call(tokens())
        said.append(str(caught.value))
        assert not mhc_compile.connections(model)
        if way in {"whole", "attach"}:
            if way == "whole":
                model.reset_iter_state()  # what torch asks for after an error in a forward
            model(tokens()).sum().backward()
            assert model.blocks[0].norm1.weight.grad.full_tensor().any()
    return said


def test_attaching_too_late(ranks):
    for said in ranks.run(late):
        assert all("mhc_compile.attach(model, inputs) first" in message for message in said)
        assert all("mhc run --plan" in message for message in said)
        assert all("FSDP" in message for message in said)


def from_meta(rank, apply, init):
    """The whole hyper-connections of a model that was sharded on the meta device, and how far its
    function is from the plain model's. Every rank draws other random numbers.
    """
    with torch.device("meta"):
        model = Decoder(16, 3)
    mhc_compile.attach(model, tokens().to("meta"), options={"init": init})
    shard(model, "whole", None, APART, apply)
    torch.manual_seed(100 + rank)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Embedding):
            with torch.no_grad():
                for parameter in module.parameters(recurse=False):
                    parameter.fill_(0.01)
    out = torch.compile(model, backend="mhc", options={"inner_backend": "eager", "init": init})(tokens())
    plain = Decoder(16, 3)
    for parameter in plain.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    own = {n: whole(p) for n, p in model.named_parameters() if ".mhc." in n}
    return own, (out - plain(tokens())).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("apply", [fully_shard, torch_fully_shard])
@pytest.mark.parametrize("init", ["preserve", "random"])
def test_sharded_on_the_meta_device(ranks, apply, init):
    (first, error), (second, _) = ranks.run(from_meta, apply, init)
    want = Decoder(16, 3)
    mhc_compile.attach(want, tokens(), options={"init": init})
    own = {n: p for n, p in want.named_parameters() if ".mhc." in n}
    assert own.keys() == first.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if name.endswith("phi") and init == "random":
            assert value.std().item() == pytest.approx(own[name].std().item(), rel=0.1), name
        else:
            assert torch.equal(value, own[name]), name
    assert init == "random" or error < 1e-6


def first_version(rank):
    """Errors of models in FSDP1, attached before and not, and compiled inside and outside."""
    said = []
    for model, inside in itertools.product((build(), Decoder()), (True, False)):
        torch._dynamo.reset()
        compiled = functools.partial(torch.compile, backend="mhc", options={"inner_backend": "eager"})
        wrapped = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        call = wrapped(compiled(model)) if inside else compiled(wrapped(model))
        with pytest.raises(mhc_compile.errors.AttachError) as caught:
            call(tokens())
        said.append(str(caught.value))
    return said


@pytest.mark.slow
def test_fsdp1_is_rejected(ranks):
    for said in ranks.run(first_version):
        assert all("fully_shard (FSDP2), after mhc_compile.attach" in message for message in said)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner_backend", [None, "aot_eager"])
def test_ways_to_compile_and_to_shard(ranks, way, inner_backend):
    cases = [(way, APART, fully_shard), (way, None, fully_shard), (way, None, torch_fully_shard)]
    ranks.run(compare, cases if inner_backend is None else cases[:1], inner_backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"),
    [("method", Wrapped), ("module", Wrapped), ("whole", Wrapped), ("method", Recomputing), ("module", Recomputing)],
)
def test_activation_checkpointing(ranks, way, kind):
    ranks.run(compare, [(way, APART, fully_shard)], None, kind)


@pytest.mark.slow
def test_blocks_that_dynamo_leaves_to_eager_mode_run_on_streams(ranks):
    """It does not trace `checkpoint` round a module with FSDP's hooks."""
    ranks.run(compare, [("whole", APART, fully_shard)], "eager", Recomputing)


def save(rank, folder):
    """Trains a sharded model, saves its checkpoint, and returns the whole state of rank 0."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    model = build()
    train(shard(model, "method", {"inner_backend": "eager"}, BF16), model, rank, 2)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_loaded_by_one(ranks, tmp_path):
    import torch.distributed.checkpoint as checkpoint

    whole, _ = ranks.run(save, tmp_path / "saved")
    model = build()
    assert whole.keys() == model.state_dict().keys()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"model": model.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name
        assert value.dtype == torch.float32
    assert not torch.equal(model.blocks[1].mhc.mlp.phi, fresh["blocks.1.mhc.mlp.phi"])
    other = build()
    other.load_state_dict(whole)
    results = [torch.compile(m, backend="mhc", options={"inner_backend": "eager"})(tokens()) for m in (model, other)]
    assert torch.equal(*results)


def accumulate(rank, way, policy, apply):
    """Two halves of every batch, of which the last is reduced."""
    want = alone("eager")
    model = build()
    call = shard(model, way, {"inner_backend": "eager"}, policy, apply)
    train(call, model, rank, 2, wrapper=model, micro=2).assert_close(want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "policy", "apply"), [("method", APART, fully_shard), ("whole", None, torch_fully_shard)]
)
def test_gradient_accumulation(ranks, way, policy, apply):
    ranks.run(accumulate, way, policy, apply)


def checkpoint_of(model, optimizer):
    import torch.distributed.checkpoint.state_dict as states

    state, optimizer_state = states.get_state_dict(model, optimizer)
    return {"model": state, "optimizer": optimizer_state}


def half(rank, folder, parts, policy, saved):
    """Train half of the steps with FSDP2, or alone, and save; or load, and train the other half."""
    import torch.distributed.checkpoint as checkpoint
    import torch.distributed.checkpoint.state_dict as states

    options = {"inner_backend": "eager"}
    model = Decoder(16, 3) if saved else build()
    if saved:
        mhc_compile.attach(model, tokens())
    call = (
        shard(model, "method", options, policy) if parts > 1 else torch.compile(model, backend="mhc", options=options)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if saved:
        state = checkpoint_of(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder, no_dist=parts == 1)
        states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    trained = train(call, model, rank, parts, optimizer=optimizer, steps=range(5, 10) if saved else range(5))
    if not saved:
        checkpoint.save(checkpoint_of(model, optimizer), checkpoint_id=folder, no_dist=parts == 1)
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, APART])
def test_resumed_with_another_number_of_processes(ranks, tmp_path, policy):
    model = build()
    call = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    want = train(call, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    want.losses[:5] = []
    ranks.run(half, tmp_path / "two", 2, policy, False)
    half(0, tmp_path / "two", 1, policy, True).assert_close(want)
    half(0, tmp_path / "one", 1, policy, False)
    for got in ranks.run(half, tmp_path / "one", 2, policy, True):
        got.assert_close(want)
