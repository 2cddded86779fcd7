"""Optimizers that were built before the first compiled call."""

from __future__ import annotations

import pytest
import torch
from builders import LAYERS, Decoder, tokens, twin

import mhc_compile

EAGER = {"inner": "eager"}


def step(compiled, optimizer):
    optimizer.zero_grad()
    compiled(tokens()).square().mean().backward()
    optimizer.step()


def trained(model, optimizer) -> dict[str, int]:
    """How often each hyper-connection parameter stands in the optimizer's groups."""
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return {name: listed.count(id(p)) for name, p in model.named_parameters() if ".mhc." in name}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    ],
)
def test_an_optimizer_built_before_the_first_call_trains_the_new_parameters(make):
    model = Decoder()
    optimizer = make(list(model.parameters()))
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    step(compiled, optimizer)
    assert set(trained(model, optimizer).values()) == {1}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".mhc." in name}
    for _ in range(3):
        step(compiled, optimizer)
    assert len(before) == 3 * 2 * LAYERS
    assert set(trained(model, optimizer).values()) == {1}
    named = dict(model.named_parameters())
    assert all(not torch.equal(named[name], old) for name, old in before.items() if not name.endswith("scale"))


def test_joining_and_attaching_ahead_train_the_same():
    early = Decoder()
    late = twin(early)
    optimizer = torch.optim.AdamW(early.parameters(), lr=1e-2)
    compiled = torch.compile(early, backend="mhc", options=EAGER)
    mhc_compile.attach(late, tokens())
    other = torch.optim.AdamW(late.parameters(), lr=1e-2)
    compiled_late = torch.compile(late, backend="mhc", options=EAGER)
    for _ in range(3):
        step(compiled, optimizer)
        step(compiled_late, other)
    for (name, one), (_, two) in zip(early.named_parameters(), late.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    # The order is the model's own, so the states are interchangeable.
    fresh = torch.optim.AdamW(late.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    for one, two in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], fresh.state[two]["exp_avg"])


def test_parameters_join_the_group_of_their_block_and_its_schedule():
    model = Decoder()
    first = list(model.blocks[0].parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in first)]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.5}, {"params": rest, "lr": 0.25}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    step(compiled, optimizer)
    scheduler.step()
    groups = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(optimizer.param_groups) == 2
    assert groups[id(model.blocks[0].mhc.attn.phi)] == 0.25
    assert groups[id(model.blocks[1].mhc.attn.phi)] == 0.125


def test_matrices_join_matrices_and_vectors_join_vectors():
    """As weight decay is usually set up; an optimizer built after attaching by the same rule has the same groups in the same order."""

    def split(model):
        parameters = list(model.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ]
        )

    def names(model, optimizer):
        known = {id(p): name for name, p in model.named_parameters()}
        return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    model = Decoder()
    optimizer = split(model)
    step(torch.compile(model, backend="mhc", options=EAGER), optimizer)
    assert names(model, optimizer) == names(model, split(model))
    assert names(model, optimizer)[0].count("blocks.1.mhc.mlp.phi") == 1
    assert names(model, optimizer)[1].count("blocks.1.mhc.mlp.scale") == 1


def test_an_optimizer_built_afterwards_is_left_alone():
    model = Decoder()
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(compiled, optimizer)
    assert set(trained(model, optimizer).values()) == {1}


def test_two_optimizers_and_a_stranger():
    model, stranger = Decoder(), torch.nn.Linear(2, 2)
    foreign = torch.optim.SGD(stranger.parameters(), lr=0.1)
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    vectors = torch.optim.SGD([p for p in model.parameters() if p.dim() < 2], lr=0.1)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens()).sum().backward()
    for optimizer in (foreign, matrices, vectors):
        optimizer.step()
    total = [trained(model, o) for o in (matrices, vectors)]
    assert {a + b for a, b in zip(total[0].values(), total[1].values(), strict=True)} == {1}  # exactly once
    assert not any(trained(model, foreign).values())


def test_warn_and_off():
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="mhc", options={"optimizer": "warn", **EAGER})
    with pytest.warns(mhc_compile.MhcWarning, match=f"SGD was built before .* does not train {2 * LAYERS} of them"):
        step(compiled, optimizer)
    assert not any(trained(model, optimizer).values())
    torch._dynamo.reset()
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(torch.compile(model, backend="mhc", options={"optimizer": "off", **EAGER}), optimizer)
    assert not any(trained(model, optimizer).values())
