"""Groups of parameters for an optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.builders import LAYERS, Decoder, tokens, twin
from torch import nn

import mhc_compile
import mhc_compile.errors


@pytest.fixture(scope="module")
def attached():
    model = Decoder()
    mhc_compile.attach(model, tokens())
    return model


@pytest.fixture
def model(attached):
    return twin(attached)


def names(model, group):
    paths = {id(p): name for name, p in model.named_parameters()}
    return [paths[id(p)] for p in group["params"]]


def test_matrices_are_decayed_and_nothing_else(model):
    decayed, others = mhc_compile.parameter_groups(model, weight_decay=0.1)
    assert (decayed.pop("weight_decay"), others.pop("weight_decay")) == (0.1, 0.0)
    assert decayed.keys() == others.keys() == {"params"}
    order = [name for name, _ in model.named_parameters()]
    assert names(model, decayed) == [
        n for n in order if n.endswith("phi") or (n.endswith("weight") and "norm" not in n)
    ]
    assert names(model, others) == [n for n in order if n.endswith(("bias", "scale")) or "norm" in n]
    assert sum(n.endswith(("mhc.attn.bias", "mhc.mlp.scale")) for n in names(model, others)) == 2 * LAYERS


def test_weight_decay_leaves_the_start_of_static_coefficients_alone(model):
    """Without any gradient to speak of, AdamW with strong decay moves phi and not the biases that
    make H_res the identity.
    """
    start = twin(model)
    nn.init.ones_(model.blocks[0].mhc.attn.phi)
    optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model, weight_decay=1.0), lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name in ("attn", "mlp"):
        got, want = model.blocks[0].mhc.get(name), start.blocks[0].mhc.get(name)
        assert torch.equal(got.bias, want.bias)
        assert torch.equal(got.scale, want.scale)
    assert (model.blocks[0].mhc.attn.phi == 0.5).all()


def test_rates(model):
    groups = mhc_compile.parameter_groups(model, weight_decay=0.1, lr=1e-3, mhc_lr=1e-2)
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.1, 1e-3), (0.0, 1e-3), (0.1, 1e-2), (0.0, 1e-2)]
    assert [{".mhc." in name for name in names(model, g)} for g in groups] == [{False}, {False}, {True}, {True}]
    groups = mhc_compile.parameter_groups(model, weight_decay=0.1, mhc_lr=1e-2)
    optimizer = torch.optim.AdamW(groups, lr=5e-4)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-4, 1e-2, 1e-2]


def test_shared_once_and_frozen_left_out(model):
    model.head.weight = model.embed.weight
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.requires_grad_(False)
    groups = mhc_compile.parameter_groups(model, weight_decay=0.1)
    found = [name for group in groups for name in names(model, group)]
    assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert found.count("embed.weight") == 1
    assert "blocks.1.mhc.attn.phi" in found
    assert not any(name.startswith("blocks.0") for name in found)


def test_norms_of_several_dimensions_and_parameters_chosen_by_name(model):
    model.norm = nn.LayerNorm([5, 8])
    decayed, others = mhc_compile.parameter_groups(
        model, weight_decay=0.1, no_decay=lambda name, parameter: name.startswith("embed") and parameter.dim() == 2
    )
    assert {"norm.weight", "norm.bias", "embed.weight"} <= set(names(model, others))
    assert "head.weight" in names(model, decayed)


def test_empty_groups_are_left_out(model):
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    (group,) = mhc_compile.parameter_groups(model, weight_decay=0.1)
    assert group["weight_decay"] == 0.0


def test_compiled_models_and_names(model):
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    groups = mhc_compile.parameter_groups(compiled, weight_decay=0.1, named=True)
    optimizer = torch.optim.AdamW(groups)
    plain = torch.optim.AdamW(mhc_compile.parameter_groups(model, weight_decay=0.1))
    for named, unnamed in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert [id(p) for p in named["params"]] == [id(p) for p in unnamed["params"]]
        assert named["param_names"] == names(model, named)
    compiled(tokens()).square().mean().backward()
    optimizer.step()
    assert all(c.phi.any() for c in mhc_compile.connections(model).values())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
        list(model.parameters())
    )  # nothing joined twice


def test_an_optimizer_built_before_with_groups_of_the_same_kind_is_interchangeable():
    early = Decoder()
    late = twin(early)
    mhc_compile.attach(late, tokens())
    later = torch.optim.SGD(mhc_compile.parameter_groups(late, weight_decay=0.1), lr=0.1)
    groups = [
        {"params": [p for p in early.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in early.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    earlier = torch.optim.SGD(groups, lr=0.1)
    mhc_compile.attach(early, tokens())
    for one, two in zip(earlier.param_groups, later.param_groups, strict=True):
        assert names(early, one) == names(late, two)


def test_without_hyper_connections():
    model = Decoder()
    for candidate in (model, torch.compile(model, backend="mhc")):
        with pytest.raises(
            mhc_compile.errors.AttachError, match=r"Decoder has no hyper-connections yet.*mhc_compile\.attach"
        ):
            mhc_compile.parameter_groups(candidate, weight_decay=0.1)


@pytest.mark.parametrize("option", ["weight_decay", "lr", "mhc_lr"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_numbers_out_of_range(model, option, value):
    with pytest.raises(
        mhc_compile.errors.OptionError, match=f"{option} is {value!r}; expected a finite number, 0 or more"
    ):
        mhc_compile.parameter_groups(model, **{"weight_decay": 0.1, option: value})
