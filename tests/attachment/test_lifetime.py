"""Models come and go: the package keeps none, many of a class do not disturb each other, and
detached ones are plain.
"""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from helpers.builders import Small, points, twin
from torch import fx

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}


def compile_(model, inner_backend="eager", **options):
    return torch.compile(model, backend="mhc", options={"inner_backend": inner_backend, **options})


def graph_modules():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names of torch complain when they are looked at
        return sum(isinstance(thing, fx.GraphModule) for thing in gc.get_objects())


def live_and_die(inner_backend, before=lambda model: None):
    """Everything that a model meets in its life; what is left afterwards are weak references to it
    and to its parts.
    """
    model = Small()
    before(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    compiled = compile_(model, inner_backend)
    compiled(points()).sum().backward()
    optimizer.step()
    average.update_parameters(model)
    mhc_compile.load_state_dict(model, compiled.state_dict())
    return [weakref.ref(part) for part in (model, average, *(p for m in (model, average.module) for p in parts(m)))]


def parts(model):
    connection = model.pair.mhc.first
    return [connection, connection.phi, model.pair.first, model.outwards.weight]


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reset", [False, True], ids=["without reset", "after torch._dynamo.reset"])
def test_a_model_dies_with_its_last_reference(inner_backend, reset):
    left = live_and_die(inner_backend, lambda model: mhc_compile.attach(model, points()))
    if reset:
        torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_a_model_that_never_met_an_optimizer_is_forgotten():
    from mhc_compile.attachment import optimizers

    before = len(optimizers._waiting)
    model = Small()
    mhc_compile.attach(model, points())
    assert len(optimizers._waiting) == before + 2
    del model
    gc.collect()
    assert len(optimizers._waiting) == before


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_graphs_do_not_pile_up(inner_backend):
    """Without a reset torch keeps the graphs of a class; of many models no more than of one, and
    after a reset none.
    """
    torch._dynamo.reset()
    before = graph_modules()
    counts = []
    for _ in range(2):
        live_and_die(inner_backend)
        counts.append(graph_modules() - before)
    assert counts[0] > 0
    assert counts[1] <= counts[0]
    torch._dynamo.reset()
    assert graph_modules() <= before


@torch._dynamo.config.patch(recompile_limit=3)
@pytest.mark.slow
def test_more_models_of_a_class_than_dynamo_compiles_versions():
    models = [Small() for _ in range(torch._dynamo.config.recompile_limit + 2)]
    calls = [compile_(model, strict=True) for model in models]
    for model, call in zip(models, calls, strict=True):
        plain = twin(model)
        assert torch.allclose(call(points()), plain(points()), atol=1e-6)
        assert len(mhc_compile.connections(model)) == 2


@pytest.mark.slow
def test_models_of_a_class_share_what_was_compiled():
    graphs = []

    def inner_backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    models = [Small() for _ in range(3)]
    calls = [compile_(model, inner_backend) for model in models]
    want = []
    for model, call in zip(models, calls, strict=True):
        call(points())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        want.append(call(points()))
    assert len(graphs) == 3  # one for each model that got its hyper-connections in the first call
    for call, out in zip(calls, want, strict=True):
        assert torch.equal(call(points()), out)
    late = Small()
    late.load_state_dict(twin(models[0]).state_dict(), strict=False)
    mhc_compile.attach(late, points())
    mhc_compile.load_state_dict(late, models[0].state_dict())
    assert torch.equal(compile_(late, inner_backend)(points()), want[0])
    assert len(graphs) == 3  # and none for the others


@pytest.mark.slow
def test_versions_of_other_backends_survive():
    """Only those of the same backend, with the same options, make room for one another."""
    graphs = []

    def inner_backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model, other = Small(), Small()
    mhc_compile.attach(model, points())
    stranger = torch.compile(model, backend=inner_backend)
    stranger(points())
    ours = compile_(model, inner_backend)
    ours(points())
    assert len(graphs) == 2
    compile_(other)(points())
    compile_(Small(), iterations=5)(points())
    stranger(points())
    ours(points())
    assert len(graphs) == 2


def test_reset_in_between():
    model = Small()
    compiled = compile_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(points()).square().mean().backward()
        optimizer.step()
    want = compiled(points())
    connections = mhc_compile.connections(model)
    torch._dynamo.reset()
    assert torch.equal(compiled(points()), want)
    assert mhc_compile.connections(model) == connections


# Off again


def fingerprint(model):
    """All that a plain model has: the attributes of every module, its hooks included, and its
    entries.
    """
    return {
        name: {
            key: sorted(map(str, value)) if isinstance(value, dict) else type(value)
            for key, value in vars(module).items()
            if key != "_compile_kwargs"  # where Lightning was imported, it notes there what `torch.compile` was given
        }
        for name, module in model.named_modules()
    }, list(model.state_dict())


@pytest.mark.parametrize("ran", [False, True], ids=["attached", "trained"])
def test_detach_leaves_a_model_like_one_never_attached(ran):
    model = Small()
    plain = twin(model)
    torch.compile(plain, backend="eager")(points())  # Dynamo leaves marks on what it traces
    if ran:
        compile_(model)(points()).sum().backward()
        model.zero_grad()
    else:
        mhc_compile.attach(model, points())
    assert fingerprint(model) != fingerprint(plain)
    mhc_compile.detach(model)
    assert fingerprint(model) == fingerprint(plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(points()), plain(points()))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(torch.compile(model, backend="aot_eager")(points()), plain(points()))


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_version_compiled_before_detach_starts_afresh(inner_backend):
    model = Small()
    compiled = compile_(model, inner_backend)
    compiled(points()).sum().backward()
    old = mhc_compile.connections(model)
    with torch.no_grad():
        for connection in old.values():
            connection.phi.normal_()
            connection.bias.normal_()
    plain = twin(model)
    mhc_compile.detach(plain)
    assert not torch.allclose(compiled(points()), plain(points()), atol=1e-3)
    mhc_compile.detach(model)
    assert torch.allclose(compiled(points()), plain(points()), atol=1e-6)
    new = mhc_compile.connections(model)
    assert new.keys() == old.keys()
    assert not any(new[name] is old[name] for name in new)
    model.zero_grad()
    compiled(points()).sum().backward()
    assert all(connection.phi.grad is not None for connection in new.values())


def test_earlier_compiled_version_uses_newly_attached_parameters():
    model = Small()
    compiled = compile_(model)
    compiled(points())
    mhc_compile.detach(model)
    new = mhc_compile.attach(model, points())
    with torch.no_grad():
        for connection in new.values():
            connection.phi.normal_()
            connection.bias.normal_()
    want = compile_(twin(model))(points())
    assert torch.equal(compiled(points()), want)
    mhc_compile.detach(model)
    mhc_compile.attach(model, points(), options={"streams": 2})
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"has streams=2, the options say streams=4.*detach\(model\)"
    ):
        compiled(points())
