"""Optimizers that were built before the hyper-connections were attached."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from helpers.builders import Decoder, tokens, twin
from torch import nn
from torch.optim import lr_scheduler

import mhc_compile
from mhc_compile import _torch

EAGER = {"inner_backend": "eager"}


def loss_of(compiled):
    return compiled(tokens()).square().mean()


def step(compiled, optimizer):
    optimizer.zero_grad()
    loss_of(compiled).backward()
    optimizer.step()


def compile_eagerly(model, **options):
    return torch.compile(model, backend="mhc", options={**EAGER, **options})


def hyper(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".mhc." in name}


def listed(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(model, *optimizers) -> set[int]:
    """How often hyper-connection parameters stand in the optimizers' groups."""
    found = [id(p) for optimizer in optimizers for p in listed(optimizer)]
    return {found.count(id(p)) for p in hyper(model).values()}


def group_of(optimizer, parameter) -> int:
    """Index of the one group that holds `parameter`."""
    (index,) = (i for i, group in enumerate(optimizer.param_groups) if any(p is parameter for p in group["params"]))
    return index


def matrices(model):
    return [p for p in model.parameters() if p.dim() >= 2]


def vectors(model):
    return [p for p in model.parameters() if p.dim() < 2]


def assert_equal(one, two):
    for (name, left), (_, right) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(left, right), name


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.25),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


def give_gradients(model, seed: int) -> None:
    """The same gradient for the parameter of the same name, whatever else the model has."""
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.slow
def test_every_optimizer_built_before_trains_as_one_built_after():
    """It has stepped on the plain model already, so it has state, and what makes its state when it
    is built is given some for the new parameters.
    """
    model = Decoder(layers=1)
    optimizers = {name: make(model.parameters()) for name, make in OPTIMIZERS.items()}
    for optimizer in optimizers.values():
        give_gradients(model, 0)
        optimizer.step()
    mhc_compile.attach(model, tokens())
    for name, make in OPTIMIZERS.items():
        early, optimizer = copy.deepcopy((model, optimizers[name]))
        assert trained(early, optimizer) == {1}, name
        late = twin(early)
        other = make(late.parameters())
        for one, two in zip(early.parameters(), late.parameters(), strict=True):
            if one in optimizer.state and not any(one is p for p in hyper(early).values()):
                other.state[two] = copy.deepcopy(optimizer.state[one])
        assert [p in optimizer.state for p in hyper(early).values()] == [p in other.state for p in hyper(late).values()]
        before = {path: p.detach().clone() for path, p in hyper(early).items()}
        for seed in range(3):
            for its, optimizes in ((early, optimizer), (late, other)):
                give_gradients(its, seed)
                optimizes.step()
        assert_equal(early, late)
        assert not any(torch.equal(p, before[path]) for path, p in hyper(early).items()), name
        # The order is the model's own, so the states are interchangeable.
        fresh = make(late.parameters())
        fresh.load_state_dict(optimizer.state_dict())
        for one, two in zip(early.parameters(), late.parameters(), strict=True):
            assert optimizer.state[one].keys() == fresh.state[two].keys()
            for key, value in optimizer.state[one].items():
                assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(fresh.state[two][key])), key


@pytest.mark.parametrize("name", ["adamw-fused", pytest.param("sgd", marks=pytest.mark.slow)])
def test_joining_and_attaching_ahead_train_the_same(name):
    early = Decoder(layers=1)
    late = twin(early)
    optimizer = OPTIMIZERS[name](early.parameters())
    mhc_compile.attach(late, tokens())
    other = OPTIMIZERS[name](late.parameters())
    compiled, compiled_late = compile_eagerly(early), compile_eagerly(late)
    for _ in range(3):
        step(compiled, optimizer)
        step(compiled_late, other)
    assert trained(early, optimizer) == trained(late, other) == {1}
    assert len(hyper(early)) == 3 * 2
    assert_equal(early, late)


def test_clipping_over_the_groups_sees_the_first_gradients():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(compile_eagerly(model)).backward()
    assert all(p.grad is not None for p in hyper(model).values())
    torch.nn.utils.clip_grad_norm_(listed(optimizer), 1e-3)
    optimizer.step()
    moved = [p.detach() - start[name] for name, p in model.named_parameters() if name in start]
    fresh = [p.grad for p in hyper(model).values()]
    assert torch.cat([g.flatten() for g in (*moved, *fresh)]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert torch.cat([g.flatten() for g in fresh]).norm() > 0


@pytest.mark.parametrize(("name", "unscale"), [("sgd", False), ("adamw-fused", True)])
def test_a_gradient_scaler_unscales_the_first_gradients(name, unscale):
    """`scaler.step` divides the gradients in the groups before the optimizer steps: who joined
    during the step would be 1024 times too large.
    """
    models = {}
    for scale in (None, 1024.0):
        torch.manual_seed(1)
        model = Decoder(layers=1)
        optimizer = OPTIMIZERS[name](model.parameters())
        compiled = compile_eagerly(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(compiled)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        models[scale] = model
    for (path, plain), (_, scaled) in zip(
        models[None].named_parameters(), models[1024.0].named_parameters(), strict=True
    ):
        assert torch.allclose(plain, scaled, rtol=1e-4, atol=1e-6), path


def test_infinite_first_gradients_are_found():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(compile_eagerly(model))).backward()
    model.blocks[0].mhc.attn.phi.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert not model.blocks[0].mhc.attn.phi.any()  # the step was left out


def test_a_closure_that_makes_the_first_call():
    """The parameters come to exist inside `step`, and take part in it."""
    model = Decoder(layers=1)
    ahead = twin(model)
    mhc_compile.attach(ahead, tokens())
    for its in (model, ahead):
        optimizer = torch.optim.SGD(its.parameters(), lr=0.1)
        compiled = compile_eagerly(its)

        def closure(optimizer=optimizer, compiled=compiled):
            optimizer.zero_grad()
            loss = loss_of(compiled)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_equal(model, ahead)
    assert model.blocks[0].mhc.attn.phi.any()


@pytest.mark.parametrize("search", [None, pytest.param("strong_wolfe", marks=pytest.mark.slow)])
def test_lbfgs_in_its_first_step(search):
    model = Decoder(layers=1)
    ahead = twin(model)
    mhc_compile.attach(ahead, tokens())
    for its in (model, ahead):
        optimizer = torch.optim.LBFGS(its.parameters(), lr=0.1, max_iter=3, line_search_fn=search)
        compiled = compile_eagerly(its)

        def closure(optimizer=optimizer, compiled=compiled):
            optimizer.zero_grad()
            loss = loss_of(compiled)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    assert_equal(model, ahead)
    assert model.blocks[0].mhc.attn.phi.any()


def test_lbfgs_with_a_memory_starts_again():
    """Its curvature is that of other parameters, in vectors of another length."""
    model = Decoder(layers=1)
    plain = torch.compile(model, backend="eager")
    compiled = compile_eagerly(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, max_eval=20)

    def closure(call):
        optimizer.zero_grad()
        loss = loss_of(call)
        loss.backward()
        return loss

    optimizer.step(lambda: closure(plain))
    before = loss_of(compiled)  # attaches: not now, the vectors are in use
    assert trained(model, optimizer) == {0}
    for _ in range(2):
        optimizer.step(lambda: closure(compiled))
    assert trained(model, optimizer) == {1}
    (state,) = optimizer.state.values()
    assert state["n_iter"] == 2 * 3
    assert len(state["d"]) == sum(p.numel() for p in model.parameters())
    assert loss_of(compiled) < before
    fresh = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, max_eval=20)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step(lambda: closure(compiled))


def linear_lambda(epoch):
    return 0.5 ** (epoch + 1)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [linear_lambda, lambda epoch: 0.9**epoch]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda epoch: 0.5, lambda epoch: 0.9]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2]),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [1]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.0, 1e-3]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=[0.05, 0.1], anneal_epochs=3),
}


@pytest.mark.slow
def test_schedulers_drive_the_groups_that_were_joined():
    """Each was built before, with values by group; none may see a group that it does not know."""
    model = Decoder(layers=1)
    runs = {}
    for name, make in SCHEDULERS.items():
        groups = [{"params": matrices(model), "lr": 0.1}, {"params": vectors(model), "lr": 0.2}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        runs[name] = optimizer, make(optimizer)
    mhc_compile.attach(model, tokens())
    for name, (optimizer, scheduler) in runs.items():
        assert len(optimizer.param_groups) == 2
        assert trained(model, optimizer) == {1}
        phi, bias = model.blocks[0].mhc.attn.phi, model.blocks[0].mhc.attn.bias
        assert (group_of(optimizer, phi), group_of(optimizer, bias)) == (0, 1)
        reference = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        other = torch.optim.SGD(
            [{"params": [p], "lr": r} for p, r in zip(reference, (0.1, 0.2), strict=True)], momentum=0.9
        )
        expected = SCHEDULERS[name](other)
        for _ in range(4):
            for its, drives in ((optimizer, scheduler), (other, expected)):
                its.step()
                drives.step(*[1.0][: name == "ReduceLROnPlateau"])
            assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups], name
        assert optimizer.param_groups[0]["lr"] != 0.1, name


def test_groups_by_depth_keep_their_rates():
    model = Decoder()
    first = list(model.blocks[0].parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in first)]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.5}, {"params": rest, "lr": 0.25}])
    step(compile_eagerly(model), optimizer)
    assert {group_of(optimizer, p) for p in model.blocks[0].mhc.parameters()} == {0}
    assert {group_of(optimizer, p) for p in model.blocks[1].mhc.parameters()} == {1}


@pytest.mark.parametrize(
    "spared_names",
    [("bias", "norm"), *(pytest.param(names, marks=pytest.mark.slow) for names in (("norm",), ("bias",)))],
)
def test_biases_and_scales_go_where_nothing_is_decayed(spared_names):
    """The last vector of a block is a bias of its MLP."""
    model = Decoder(layers=1)
    spared = [p for name, p in model.named_parameters() if any(word in name for word in spared_names)]
    rest = [p for p in model.parameters() if not any(p is q for q in spared)]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}])
    mhc_compile.attach(model, tokens())
    joined = {(name.rpartition(".")[2], group_of(optimizer, p)) for name, p in hyper(model).items()}
    assert joined == {("phi", 0), ("bias", 1), ("scale", 1)}


def test_two_optimizers_by_kind_and_a_stranger():
    model, stranger = Decoder(layers=1), nn.Linear(2, 2)
    foreign = torch.optim.SGD(stranger.parameters(), lr=0.1)
    one = torch.optim.Muon([p for p in matrices(model) if p is not model.embed.weight], lr=0.1)
    two = torch.optim.AdamW([model.embed.weight, *vectors(model)], lr=0.1)
    loss_of(compile_eagerly(model)).backward()
    for optimizer in (foreign, one, two):
        optimizer.step()
    assert trained(model, foreign) == {0}
    assert trained(model, one, two) == {1}
    assert all(any(p is q for q in listed(one)) == name.endswith("phi") for name, p in hyper(model).items())


def test_two_optimizers_by_part():
    model = Decoder()
    lower = torch.optim.SGD([*model.embed.parameters(), *model.blocks[0].parameters()], lr=0.1)
    upper = torch.optim.Adam([*model.blocks[1].parameters(), *model.norm.parameters(), *model.head.parameters()])
    mhc_compile.attach(model, tokens())
    for block, optimizer in zip(model.blocks, (lower, upper), strict=True):
        assert {id(p) for p in block.mhc.parameters()} == {id(p) for p in listed(optimizer)} & {
            id(p) for p in hyper(model).values()
        }
    assert trained(model, lower, upper) == {1}


def test_an_optimizer_of_matrices_alone_is_not_given_vectors_that_it_rejects():
    model = Decoder(layers=1)
    optimizer = torch.optim.Muon([p for p in matrices(model) if p is not model.embed.weight], lr=0.1)
    compiled = compile_eagerly(model)
    with pytest.warns(mhc_compile.MhcWarning, match="4 parameters of hyper-connections .* are in no optimizer"):
        step(compiled, optimizer)
    assert {p.dim() for p in listed(optimizer)} == {2}
    rest = torch.optim.SGD([p for p in vectors(model) if not any(p is q for q in hyper(model).values())], lr=0.1)
    step(compiled, rest)  # built since, of a list without them
    assert trained(model, optimizer, rest) == {1}


def test_a_part_that_no_optimizer_trains_yet():
    model = Decoder(layers=1)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    compiled = compile_eagerly(model)
    with pytest.warns(mhc_compile.MhcWarning, match="6 parameters of hyper-connections .* are in no optimizer"):
        step(compiled, head)
    assert trained(model, head) == {0}  # the blocks are not trained, and nor is what belongs to them
    head.add_param_group(
        {"params": [p for p in model.blocks.parameters() if not any(p is q for q in hyper(model).values())]}
    )
    step(compiled, head)
    assert trained(model, head) == {1}


def test_matrices_join_matrices_and_vectors_join_vectors():
    """As weight decay is usually set up; an optimizer built after attaching by the same rule has
    the same groups in the same order.
    """

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

    model = Decoder(layers=1)
    optimizer = split(model)
    step(torch.compile(model, backend="mhc", options=EAGER), optimizer)
    assert names(model, optimizer) == names(model, split(model))
    assert names(model, optimizer)[0].count("blocks.0.mhc.mlp.phi") == 1
    assert names(model, optimizer)[1].count("blocks.0.mhc.mlp.scale") == 1


def test_optimizer_built_after_attach_is_unchanged():
    model = Decoder(layers=1)
    compiled = compile_eagerly(model)
    compiled(tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(compiled, optimizer)
    assert trained(model, optimizer) == {1}


def test_hyper_connections_with_an_optimizer_of_their_own():
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens())
    mine = torch.optim.SGD(hyper(model).values(), lr=0.1)
    others = torch.optim.SGD([p for name, p in model.named_parameters() if ".mhc." not in name], lr=0.1)
    compiled = compile_eagerly(model)
    loss_of(compiled).backward()
    others.step()
    mine.step()
    assert trained(model, others) == {0}
    assert trained(model, mine) == {1}


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update that is trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Residual(nn.Module):
    """Owner of the add, around a branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def test_frozen_owners_with_adapters_inside():
    model = Decoder(layers=1).requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    compiled = compile_eagerly(model)
    for _ in range(2):
        step(compiled, optimizer)
    assert trained(model, optimizer) == {1}
    assert model.blocks[0].mhc.mlp.phi.any()


def test_frozen_owners_with_something_trained_around_them():
    """The nearest module that trains something: the adapter of the same layer, not the head."""
    layers = [
        nn.Sequential(Residual(nn.Linear(4, 4).requires_grad_(False)), Residual(Adapted(nn.Linear(4, 4))))
        for _ in range(2)
    ]
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    groups = [[p for p in part.parameters() if p.requires_grad] for part in model]
    optimizer = torch.optim.SGD([{"params": parameters} for parameters in groups], lr=0.1)
    attached = mhc_compile.attach(model, torch.randn(2, 4))
    assert len(attached) == 4
    assert trained(model, optimizer) == {1}
    # Matrices are trained in the layer; vectors in the head alone.
    assert [group_of(optimizer, c.phi) for c in attached.values()] == [0, 0, 1, 1]
    assert {group_of(optimizer, c.bias) for c in attached.values()} == {2}


def test_a_frozen_model_in_an_optimizer_that_lists_it():
    model = Decoder(layers=1).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mhc_compile.attach(model, tokens())
    assert trained(model, optimizer) == {1}


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.slow), "module."])
def test_names_stay_in_step(prefix):
    model = Decoder(layers=1)
    wrapper = nn.ModuleDict({"module": model}) if prefix else model
    optimizer = torch.optim.SGD(wrapper.named_parameters(), lr=0.1)
    step(compile_eagerly(model), optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in wrapper.named_parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in wrapper.parameters()]
    fresh = torch.optim.SGD(wrapper.named_parameters(), lr=0.2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["param_names"] == group["param_names"]


def test_names_of_a_compiled_model():
    model = Decoder(layers=1)
    compiled = compile_eagerly(model)
    optimizer = torch.optim.SGD(compiled.named_parameters(), lr=0.1)
    step(compiled, optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in compiled.named_parameters()]


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_a_checkpoint_without_hyper_connections_loaded_before_the_first_call():
    model = Decoder(layers=1)
    old = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model).backward()
    old.step()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(saved(old))
    compiled = compile_eagerly(model)
    for _ in range(2):
        step(compiled, optimizer)
    assert trained(model, optimizer) == {1}
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.state[model.head.weight]["step"] == 3  # goes on where it was
    assert optimizer.state[model.blocks[0].mhc.attn.phi]["step"] == 2


@pytest.mark.parametrize("optimizer_first", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_with_hyper_connections_loaded_before_the_first_call(optimizer_first):
    model = Decoder(layers=1)
    start = twin(model)
    running = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = compile_eagerly(model)
    for _ in range(2):
        step(compiled, running)
    weights, state = copy.deepcopy(model.state_dict()), saved(running)
    step(compiled, running)

    resumed = start
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1.0) if optimizer_first else None
    mhc_compile.attach(resumed, tokens())
    optimizer = optimizer or torch.optim.AdamW(resumed.parameters(), lr=1.0)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    step(compile_eagerly(resumed), optimizer)
    assert trained(resumed, optimizer) == {1}
    assert_equal(model, resumed)


def test_gradients_zeroed_in_place_and_steps_before_the_first_call():
    model = Decoder(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    compiled = compile_eagerly(model)
    loss_of(compiled).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in hyper(model).values())


class Wrapper:
    """As libraries wrap optimizers: no Optimizer, steps through another method, shares the
    groups.
    """

    def __init__(self, optimizer):
        self.inner = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self.inner.step()


class Subclass(torch.optim.Optimizer):
    """As accelerate wraps optimizers: an Optimizer that never was initialised, whose groups are a
    property.
    """

    def __init__(self, optimizer):
        self.inner = optimizer

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self):
        self.inner.step()


@pytest.mark.parametrize("wrap", [Wrapper, Subclass])
def test_wrapped_optimizers(wrap):
    model = Decoder(layers=1)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(compile_eagerly(model)).backward()
    assert trained(model, optimizer) == {1}
    optimizer.step()
    assert trained(model, optimizer) == {1}
    assert model.blocks[0].mhc.attn.phi.any()


@pytest.mark.parametrize("stepped_before", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_step(stepped_before):
    model = Decoder(layers=1)
    ahead = twin(model)
    mhc_compile.attach(ahead, tokens())
    for its in (model, ahead):
        optimizer = torch.optim.SGD(its.parameters(), lr=0.1, momentum=0.9)
        its_step = torch.compile(optimizer.step, backend="eager")
        compiled = compile_eagerly(its)
        if stepped_before:  # for the parameters that there are
            for p in its.parameters():
                p.grad = torch.zeros_like(p)
            its_step()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(compiled).backward()
            its_step()
    assert_equal(model, ahead)
    assert model.blocks[0].mhc.attn.phi.any()


def test_the_hook_breaks_no_graph_of_a_compiled_step():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens())  # waits for an optimizer
    hook = mhc_compile.attachment.optimizers._before_step

    @torch.compile(backend="eager", fullgraph=True)
    def call(x):
        hook(optimizer, (), {})
        return x + 1

    assert call(torch.zeros(())) == 1


def test_optimizers_that_the_collector_does_not_show():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.freeze()
    try:
        compiled = compile_eagerly(model)
        loss_of(compiled).backward()
        optimizer.step()
    finally:
        gc.unfreeze()
    assert trained(model, optimizer) == {1}


def test_detaching_takes_the_parameters_out_again():
    model = Decoder(layers=1)
    plain = twin(model)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    step(compile_eagerly(model), optimizer)
    mhc_compile.detach(model)
    fresh = torch.optim.AdamW(plain.named_parameters(), lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == fresh.param_groups[0]["param_names"]
    assert [id(p) for p in listed(optimizer)] == [id(p) for p in model.parameters()]
    assert optimizer.state.keys() == set(model.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    optimizer.step()
    compiled = compile_eagerly(model, streams=2)  # and on again, of another size
    for _ in range(2):
        step(compiled, optimizer)
    assert [id(p) for p in listed(optimizer)] == [id(p) for p in model.parameters()]
    assert trained(model, optimizer) == {1}


def test_model_without_optimizer_is_looked_up_once(monkeypatch):
    """A teacher beside a student: the optimizer of the student must not search the process before
    every step.
    """
    gc.collect()  # models of other tests, which wait for an optimizer too
    teacher, student = Decoder(layers=1), nn.Linear(2, 2)
    mhc_compile.attach(teacher, tokens())
    searches = []
    living = _torch.living_optimizers
    monkeypatch.setattr(_torch, "living_optimizers", lambda: searches.append(1) or living())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.step()
    assert len(searches) == 1


def test_the_heap_is_searched_once_and_later_optimizers_are_known(monkeypatch):
    _torch.living_optimizers()
    monkeypatch.setattr("gc.get_objects", lambda: pytest.fail("searched again"))
    model = Decoder(layers=1)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    unpickled = pickle.loads(pickle.dumps(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)))
    assert {id(made), id(unpickled)} <= {id(optimizer) for optimizer in _torch.living_optimizers()}
    step(compile_eagerly(model), made)
    assert trained(model, made) == {1}


def test_warn_and_off():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = compile_eagerly(model, existing_optimizers="warn")
    with pytest.warns(mhc_compile.MhcWarning, match="SGD was built before .* does not train 2 of them"):
        step(compiled, optimizer)
    step(compiled, optimizer)  # once is enough
    assert trained(model, optimizer) == {0}
    torch._dynamo.reset()
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(compile_eagerly(model, existing_optimizers="ignore"), optimizer)
    assert trained(model, optimizer) == {0}
