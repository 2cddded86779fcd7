"""What carries the state of a model carries that of its hyper-connections: state dicts, files,
copies, averages, other devices and dtypes.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.builders import Small, points, twin
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
SITES = list(Small.SITES)


def compile_(model, **options):
    return torch.compile(model, backend="mhc", options={**EAGER, **options})


def attached(**options):
    model = Small()
    mhc_compile.attach(model, points(), options=options)
    return model


def disturb(model, seed=0):
    """Every parameter elsewhere, so that no two models agree by chance and the streams differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outputs(model):
    with torch.no_grad():
        return compile_(model)(points())


def train(model, optimizer, steps=2, compiled=None):
    compiled = compile_(model) if compiled is None else compiled
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compiled(points()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# State dicts and files


def through_state_dict(model, other, folder):
    other.load_state_dict(model.state_dict())


def through_assignment(model, other, folder):
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def through_torch_save(model, other, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def through_safetensors(model, other, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    other.load_state_dict(safetensors.load_file(folder / "model.safetensors"))


def through_safetensors_of_models(model, other, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, folder / "model.safetensors")
    assert safetensors.load_model(other, folder / "model.safetensors") == (set(), [])


def through_dcp(model, other, folder):
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    other.load_state_dict(state["model"])


WAYS = [
    through_state_dict,
    through_assignment,
    through_torch_save,
    through_safetensors,
    through_safetensors_of_models,
    through_dcp,
]


@pytest.fixture(scope="module")
def ran():
    """A model that ran before its parameters changed, what it computes since, and one that did not
    run.
    """
    torch._dynamo.reset()
    model, other = Small(), attached()
    compiled = compile_(model)
    with torch.no_grad():
        start = compiled(points())
        disturb(model)
        want = compiled(points())
    assert not torch.allclose(want, start)
    assert not same(model, other)
    return model, want, other


@pytest.mark.parametrize("way", WAYS)
def test_state_goes_from_a_model_that_ran_to_one_that_did_not(way, ran, tmp_path):
    model, want, other = ran
    other = twin(other)
    way(model, other, tmp_path)
    assert same(model, other)
    assert torch.equal(outputs(other), want)


def test_a_compiled_model_follows_what_is_loaded_into_it():
    model, other = disturb(attached()), attached()
    compiled = compile_(other)
    compiled(points())
    want = outputs(model)
    for assign in (False, True):
        disturb(other, seed=5)
        other.load_state_dict(twin(model).state_dict(), assign=assign)
        assert torch.equal(compiled(points()), want)
    compiled(points()).sum().backward()
    assert all(other.get_submodule(site).phi.grad is not None for site in SITES)


def test_before_the_first_call_the_state_is_the_plain_one():
    model, plain = Small(), Small()
    compiled = compile_(model)
    model.load_state_dict(plain.state_dict())
    assert torch.allclose(compiled(points()), plain(points()), atol=1e-6)
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        f"{site}.{name}" for site in SITES for name in ("phi", "bias", "scale")
    }


def test_distributed_checkpoint_of_model_and_optimizer(tmp_path):
    """The optimizer was built before the first call; the one that resumes, after attaching.

    The losses go on as if nothing had happened.
    """
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = compile_(model)
    train(model, optimizer, compiled=compiled)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    want = train(model, optimizer, compiled=compiled)

    torch.manual_seed(99)
    other = attached()
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    model_state, optimizer_state = get_state_dict(other, resumed)
    assert f"{SITES[0]}.phi" in optimizer_state["state"]
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert train(other, resumed) == want
    assert same(model, other)


# Copies and pickles


def copies():
    yield "deepcopy", copy.deepcopy
    yield "pickle", lambda model: pickle.loads(pickle.dumps(model))
    yield "torch.save", save_and_load
    yield "deepcopy of the compiled model", lambda model: copy.deepcopy(compile_(model))._orig_mod


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "called",
    [pytest.param(False, id="before the first call"), pytest.param(True, id="after it", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.slow if name in ("deepcopy", "pickle") else ())
        for name, make in copies()
    ],
)
def test_a_copy_is_a_model_of_its_own(make, called):
    model = Small()
    if called:
        compile_(model)(points())
        disturb(model)
    other = make(model)
    assert list(mhc_compile.connections(other)) == (SITES if called else [])
    assert torch.equal(outputs(other), outputs(model))
    assert other.pair.first._mhc_declared == (other.pair.mhc.first,)
    assert other.pair.second._mhc_declared == (other.pair.mhc.second,)
    before = twin(model)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert same(model, before)
    theirs, mine = mhc_compile.connections(other), mhc_compile.connections(model)
    assert all(not torch.equal(theirs[site].phi, mine[site].phi) for site in SITES)
    assert mhc_compile.detach(other) == len(SITES)
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert mhc_compile.connections(model).keys() == mhc_compile.connections(before).keys()
    assert all(
        bool(module._forward_pre_hooks) == bool(getattr(module, "_mhc_declared", ())) for module in model.modules()
    )


# Averages


@pytest.mark.parametrize(
    ("decay", "wrap"), [(None, False), (0.5, True)], ids=["mean of the model", "exponential of the compiled model"]
)
@pytest.mark.slow
def test_an_average_made_before_the_first_call_receives_hyper_connections(decay, wrap):
    average = get_ema_multi_avg_fn(decay) if decay else None
    model, reference = Small(), Small()
    reference.load_state_dict(model.state_dict())
    compiled = compile_(model)
    early = AveragedModel(compiled if wrap else model, multi_avg_fn=average)
    assert not mhc_compile.connections(early)
    mhc_compile.attach(reference, points())
    late = AveragedModel(reference, multi_avg_fn=average)
    compiled(points())
    for seed in range(3):
        disturb(model, seed)
        disturb(reference, seed)
        early.update_parameters(model)  # the model, also where the compiled one was copied
        late.update_parameters(reference)
    inside = early.module._orig_mod if wrap else early.module
    assert same(inside, late.module)
    assert not same(inside, model)
    got = outputs(inside)
    assert torch.equal(got, outputs(late.module))
    assert not torch.allclose(got, inside_as_plain(inside), atol=1e-4)
    for site in SITES:
        assert inside.get_submodule(site) is not model.get_submodule(site)


def inside_as_plain(model):
    plain = twin(model)
    mhc_compile.detach(plain)
    with torch.no_grad():
        return plain(points())


def test_an_average_that_has_run_on_takes_hyper_connections_when_they_come():
    model = Small()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    mhc_compile.attach(model, points())
    disturb(model)
    before = twin(ema.module)
    ema.update_parameters(model)
    for name, value in ema.module.named_parameters():
        now = model.get_parameter(name)
        want = now if ".mhc." in name else (before.get_parameter(name) + now) / 2
        assert torch.allclose(value, want), name
    assert not any(p.grad is not None for p in ema.module.parameters())


def test_an_average_computes_on_streams_through_its_own_wrapper():
    model = attached()
    average = AveragedModel(model)
    average.update_parameters(disturb(model))
    got = outputs(average)
    assert torch.equal(got, outputs(model))
    assert not torch.allclose(got, inside_as_plain(model), atol=1e-4)
    assert len(mhc_compile.connections(average)) == len(SITES)


def test_averages_that_cannot_follow():
    model = Small()
    stranger = AveragedModel(nn.Sequential(nn.Linear(3, 3)))
    mhc_compile.attach(model, points())
    with pytest.raises(mhc_compile.errors.AttachError, match=r"Make the AveragedModel after mhc_compile\.attach"):
        stranger.update_parameters(model)
    average = AveragedModel(model)
    mhc_compile.detach(model)
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"2 hyper-connections and Small has 0.*detach\(averaged\.module\)"
    ):
        average.update_parameters(model)
    mhc_compile.detach(average.module)
    average.update_parameters(disturb(model))
    assert same(average.module, model)


# Devices and dtypes


@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_a_model_that_ran_is_cast_and_runs_on(dtype):
    model = Small()
    compiled = compile_(model)
    compiled(points())
    disturb(model)
    with torch.no_grad():
        want = compiled(points())
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    out = compiled(points().to(dtype))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), want, atol=1e-5 if dtype == torch.float64 else 0.1)
    out.sum().backward()
    assert all(model.get_submodule(site).phi.grad.dtype == dtype for site in SITES)


def test_to_the_meta_device_and_back_with_a_checkpoint():
    model = disturb(attached())
    state, want = twin(model).state_dict(), outputs(model)
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(state, assign=True)
    assert torch.equal(outputs(model), want)


def test_built_on_the_meta_device_and_reset_everywhere():
    """`to_empty` leaves garbage; what has `reset_parameters` is the whole model, hyper-connections
    included.
    """
    with torch.device("meta"):
        model = Small()
    mhc_compile.attach(model, points().to("meta"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    plain = twin(model)
    mhc_compile.detach(plain)
    assert torch.allclose(outputs(model), plain(points()), atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    assert all(model.get_submodule(site).phi.any() for site in SITES)
