"""Candidates compute what they say: n streams, the right projections, the same blocks, a training
step.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import mhc_compile
from mhc_compile.tools.bench import candidates as table
from mhc_compile.tools.bench import sites
from mhc_compile.tools.bench.builds import build
from mhc_compile.tools.bench.candidates import CANDIDATES, DEFAULT, LIMIT, NAMES, UnknownNameError, choose
from mhc_compile.tools.bench.sites import Shape
from mhc_compile.tools.bench.workloads import SiteWorkload, StepWorkload, batch

SHAPE = Shape(width=16, layers=1, tokens=6, vocabulary=32, iterations=3)
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}
BASELINES = ("deepseek-v4", "hyper-connections")
STREAMS = ("ours-none", *BASELINES)


def test_unknown_name_suggests_near_ones():
    with pytest.raises(UnknownNameError, match=r"'deepseek'.*did you mean 'deepseek-v4'"):
        choose(["deepseek"])
    with pytest.raises(UnknownNameError, match="known: plain, ours"):
        choose(["zzz"])


def test_plain_is_always_included_in_the_order_of_the_table():
    chosen, limit = choose(["hyper-connections", "ours"])
    assert [candidate.name for candidate in chosen] == ["plain", "ours", "hyper-connections"]
    assert not limit
    assert choose(["limit"])[1]
    for device in ("cpu", "cuda"):
        assert (*(candidate.name for candidate in choose([], device)[0]), LIMIT) == DEFAULT[device]
    assert (*(candidate.name for candidate in CANDIDATES), LIMIT) == NAMES
    assert {name for name in NAMES if name.startswith("ours-")} - set(DEFAULT["cpu"]) == {
        *("ours-identity", "ours-permutations", "ours-kronecker", "ours-unconstrained", "ours-single-pass"),
        *("ours-deepseek-v4", "ours-deepseek-v4.1"),
    }
    assert choose(["ours-kronecker"])[0][1].options == {"mapping": "kronecker"}


def test_missing_candidate_says_why(monkeypatch):
    assert "CUDA" in BY_NAME["liger"].missing(SHAPE)
    on_cuda = dataclasses.replace(SHAPE, device="cuda")
    assert "bfloat16" in BY_NAME["tilekernels"].missing(on_cuda)
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert BY_NAME["hyper-connections"].missing(SHAPE) == "not installed: pip install hyper-connections"
    assert BY_NAME["liger"].missing(on_cuda) == "not installed: pip install liger-kernel"
    assert BY_NAME["plain"].missing(SHAPE) is None
    assert BY_NAME["ours"].missing(SHAPE) is None


def test_a_missing_parent_package_is_missing():
    absent = dataclasses.replace(
        BY_NAME["deepseek-v4"], package="no_such_package.models", distribution="nothing[extra]"
    )
    assert absent.missing(SHAPE) == "not installed: pip install nothing[extra]"
    assert absent.installed() is None


def test_deepseek_projects_all_streams_to_all_coefficients():
    (site,), ends = BY_NAME["deepseek-v4"].sites(SHAPE, 1)
    assert site.connection.fn.shape == (24, 4 * 16)
    assert site.connection.hc_sinkhorn_iters == 3
    (head,) = ends.children()
    assert head.hc_fn.shape == (4, 4 * 16)


def test_hyper_connections_projects_each_stream_separately():
    (site,), _ = BY_NAME["hyper-connections"].sites(SHAPE, 1)
    assert site.connection.dynamic_alpha_fn.shape == (1, 16, 4 + 1)
    assert site.connection.residual_mix_constraint_fn.keywords == {"iters": 3}


@pytest.mark.parametrize("name", STREAMS)
def test_all_n_streams_are_read_and_written(name):
    (site,), ends = BY_NAME[name].sites(SHAPE, 1)
    x = torch.randn(1, 6, 16)
    streams = ends.enter(x)
    assert streams.numel() == 4 * x.numel()
    axis = next(i for i, size in enumerate(streams.shape) if size == 4)
    streams = (streams + torch.randn_like(streams)).requires_grad_()
    h, held = site.read(streams)
    assert h.shape == x.shape
    (gradient,) = torch.autograd.grad(h.square().sum(), streams, retain_graph=True)
    assert gradient.transpose(0, axis).flatten(1).norm(dim=1).min() > 0
    without, with_branch = (site.write(torch.full_like(x, value), *held) for value in (0.0, 1.0))
    written = (with_branch - without).transpose(0, axis).flatten(1)
    assert written.shape[0] == 4
    assert written.abs().min() > 0


def test_deepseek_mixes_as_its_decoder_layer_does():
    """combᵀ X; rows of comb do not sum to 1 after few iterations, columns do, so that the two
    differ.
    """
    (site,), _ = BY_NAME["deepseek-v4"].sites(SHAPE, 1)
    torch.nn.init.normal_(site.connection.fn)
    streams = torch.randn(1, 6, 4, 16)
    _, (_, post, comb) = site.read(streams)
    out = site.write(torch.zeros(1, 6, 16), streams, post, comb)
    torch.testing.assert_close(out, torch.einsum("btji,btjc->btic", comb, streams))


@pytest.mark.parametrize(
    "name",
    ["plain", "ours", "ours-single-pass", *BASELINES, pytest.param("ours-kronecker", marks=pytest.mark.slow)],
)
def test_a_site_gives_gradients_to_everything(name):
    module, inputs = BY_NAME[name].site(SHAPE)
    workload = SiteWorkload("cpu", module, module, [inputs, inputs])
    workload.backward(workload.forward())
    wanted = (*inputs, *module.parameters())
    assert [gradient.shape for gradient in workload.gradients] == [tensor.shape for tensor in wanted]
    assert all(gradient.isfinite().all() for gradient in workload.gradients)
    assert all(tensor.grad is None for tensor in wanted)
    workload.clear()
    assert not workload.gradients


def test_the_inputs_of_a_site_are_streams_that_differ():
    _, (_, streams, *_) = BY_NAME["deepseek-v4"].site(SHAPE)
    assert (streams[..., 0, :] - streams[..., 1, :]).abs().min() > 0


def test_the_blocks_start_with_the_same_weights():
    models = {}
    for name in ("plain", *STREAMS):
        torch.manual_seed(0)
        models[name] = BY_NAME[name].model(SHAPE).state_dict()
    for key, value in models["plain"].items():
        for name in STREAMS:
            assert torch.equal(models[name][key], value), (name, key)


@pytest.mark.parametrize("name", ["plain", *BASELINES])
def test_a_training_step(name):
    model = BY_NAME[name].model(SHAPE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    workload = StepWorkload("cpu", model, model, batch(SHAPE))
    times = workload.timed()
    assert math.isfinite(workload.loss)
    assert workload.loss == pytest.approx(math.log(32), rel=0.2)
    assert times.total >= times.forward + times.backward
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("blocks") for key in changed)
    assert name == "plain" or any(key.startswith("sites") for key in changed)


def test_ours_trains_the_plain_model_and_its_hyper_connections():
    model = BY_NAME["ours"].model(SHAPE)
    step = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    workload = StepWorkload("cpu", step, model, batch(SHAPE))
    workload.timed()
    connections = mhc_compile.connections(model)
    assert len(connections) == SHAPE.sites
    assert {connection.phi.shape for connection in connections.values()} == {(4 * 16, 24)}
    trained = {id(p) for group in workload.optimizer.param_groups for p in group["params"]}
    assert all(id(connection.phi) in trained for connection in connections.values())


def test_other_mappings_reach_the_site_and_the_backend(monkeypatch):
    site, _ = BY_NAME["ours-permutations"].site(SHAPE)
    assert site.connection.mapping == "permutations"
    site, _ = BY_NAME["ours-deepseek-v4"].site(SHAPE)
    assert site.connection.spec == "sinkhorn;pre_eps=1e-06;sinkhorn_eps=1e-06"
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda module, **how: seen.update(how))
    build("step", SHAPE, BY_NAME["ours-permutations"])
    own = {"streams": 4, "iterations": 3, "mapping": "permutations"}
    assert seen == {"backend": "mhc", "options": {"recompute": "cheap", **own}}


def test_the_cell_of_one_operator_is_the_cell_of_three(monkeypatch):
    three, inputs = BY_NAME["ours-none"].site(SHAPE)
    monkeypatch.setattr(sites, "step_available", lambda shape: True)
    one, _ = sites.own_cell(SHAPE, {}, fused=True)
    one.load_state_dict({key.removeprefix("site."): value for key, value in three.state_dict().items()})
    for mine, theirs in zip(one(*inputs), three(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_cell_of_a_single_pass_reads_with_the_weights_that_go_in():
    """h = Σ_j pre_j X'_j with the `pre` of the site that ends."""
    module, inputs = BY_NAME["ours-deepseek-v4.1"].site(SHAPE)
    branch, streams, post, res, pre = inputs
    h, new, *_, next_pre = module(*inputs)
    want = torch.einsum("btij,btjc->btic", res, streams) + post.unsqueeze(-1) * branch.unsqueeze(-2)
    torch.testing.assert_close(new, want)
    torch.testing.assert_close(h, torch.einsum("btn,btnc->btc", pre, want))
    assert (next_pre - pre).abs().max() > 1e-3
