"""Optimizers that treat matrices apart, step in the backward, or are given parameters by lists."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from helpers.builders import Decoder, tokens, twin
from helpers.gates import scatter
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward

import mhc_compile
from mhc_compile.attachment.optimizer_places import Place, initial_state
from mhc_compile.errors import AttachError

NOWHERE = "got gradients and are in no optimizer"


def compile_eagerly(model, **options):
    return torch.compile(model, backend="mhc", options={"inner_backend": "eager", **options})


def loss_of(compiled):
    return compiled(tokens()).square().mean()


def step(compiled, *optimizers):
    loss_of(compiled).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def hyper(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".mhc." in name}


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


def listed(*optimizers) -> list[nn.Parameter]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def how_often(model, *optimizers) -> set[int]:
    """In how many places of the optimizers hyper-connection parameters are."""
    found = [id(p) for p in listed(*optimizers)]
    return {found.count(id(p)) for p in hyper(model).values()}


def groups_of(optimizer, model) -> dict[str, set[int]]:
    """The groups of `phi`, `bias` and `scale`."""
    found: dict[str, set[int]] = {}
    for name, parameter in hyper(model).items():
        at = {i for i, group in enumerate(optimizer.param_groups) if any(p is parameter for p in group["params"])}
        found.setdefault(kind_of(name), set()).update(at)
    return found


def stir(model) -> None:
    """Other values than the start, where all streams are equal and most faults invisible."""
    scatter(model, 0.5, add=True, generator=torch.Generator().manual_seed(1))


def assert_equal(one, two):
    for (name, left), (_, right) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def assert_trains_alike(build, *, plain=None) -> tuple[nn.Module, list]:
    """Optimizers built before the first call train as those built after attaching, here by the
    same rule; return the former with their model.
    """
    early = plain or Bare()
    late = twin(early)
    optimizers = build(early)
    mhc_compile.attach(late, tokens(), options={"inner_backend": "eager"})
    compiled, ahead, others = compile_eagerly(early), compile_eagerly(late), build(late)
    compiled(tokens())
    assert how_often(early, *optimizers) == {1}
    for model in (early, late):
        stir(model)
    start = {name: p.detach().clone() for name, p in hyper(early).items()}
    for _ in range(3):
        step(compiled, *optimizers)
        step(ahead, *others)
    assert_equal(early, late)
    assert not [name for name, p in hyper(early).items() if torch.equal(p, start[name])]
    return early, optimizers


class RMS(nn.Module):
    """A norm without parameters."""

    def forward(self, x):
        return nn.functional.rms_norm(x, (x.shape[-1],))


class Bare(Decoder):
    """Its blocks hold matrices alone; `gain` is the model's one vector."""

    def __init__(self, gain=True):
        super().__init__(layers=2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
        for block in self.blocks:
            block.norm1, block.norm2 = RMS(), RMS()
        self.norm = RMS()
        if gain:
            self.gain = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.embed(ids) * getattr(self, "gain", 1.0)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def block_matrices(model):
    """With `phi` of hyper-connections, if there are any."""
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def others_than(model, parameters):
    return [p for p in model.parameters() if all(p is not q for q in parameters)]


def orthogonal(gradient):
    assert gradient.dim() == 2
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u @ v


class Whitened(torch.optim.Optimizer):
    """Takes matrices only, under a name of its own."""

    def __init__(self, parameters, lr=0.02):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(orthogonal(p.grad), alpha=-group["lr"])


class Stacking(torch.optim.Optimizer):
    """A group of the kind "matrices" holds one shape, because their gradients are stacked."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = [p.grad for p in group["params"]]
            if group["kind"] == "matrices":
                updates = torch.stack(updates)
                updates = updates / updates.norm(dim=(1, 2), keepdim=True)
            for p, update in zip(group["params"], updates, strict=True):
                p.add_(update, alpha=-group["lr"])


class Flagged(torch.optim.Optimizer):
    """Both kinds in one group; its state says since construction which is which."""

    def __init__(self, matrices, rest, lr=0.02):
        super().__init__([*matrices, *rest], {"lr": lr})
        for p in listed(self):
            self.state[p]["whiten"] = any(p is q for q in matrices)
            self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["sum"].mul_(0.5).add_(orthogonal(p.grad) if state["whiten"] else p.grad)
                p.add_(state["sum"], alpha=-group["lr"])


class Elementwise(torch.optim.Optimizer):
    """Takes anything, which its only group of matrices does not show."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in listed(self):
            if p.grad is not None:
                p.add_(p.grad.sign(), alpha=-self.param_groups[0]["lr"])


@pytest.mark.slow
def test_vectors_stay_out_of_an_optimizer_of_matrices_by_any_name():
    def build(model):
        matrices = block_matrices(model)
        return [Whitened(matrices), torch.optim.AdamW(others_than(model, matrices), lr=1e-2)]

    model, (whitened, _) = assert_trains_alike(build)
    assert {kind_of(name) for name, p in hyper(model).items() if any(p is q for q in listed(whitened))} == {"phi"}


def test_phi_stays_out_of_groups_of_one_shape():
    def build(model):
        matrices = [
            p for name, p in model.named_parameters() if p.dim() == 2 and "blocks" in name and "mhc" not in name
        ]
        rest = others_than(model, matrices)
        groups = [
            {"kind": "all", "params": [p for p in rest if p.dim() == 2], "lr": 0.01},
            {"kind": "all", "params": [p for p in rest if p.dim() < 2], "lr": 0.5},
        ]
        shapes = sorted({p.shape for p in matrices})
        groups += [{"kind": "matrices", "params": [p for p in matrices if p.shape == s], "lr": 0.01} for s in shapes]
        return [Stacking(groups)]

    model, (optimizer,) = assert_trains_alike(build)
    assert groups_of(optimizer, model) == {"phi": {0}, "bias": {1}, "scale": {1}}


@pytest.mark.slow
def test_state_of_construction_is_given_to_new_parameters():
    def build(model):
        matrices = block_matrices(model)
        return [Flagged(matrices, others_than(model, matrices))]

    model, (optimizer,) = assert_trains_alike(build, plain=Decoder(layers=1))
    assert all(optimizer.state[p]["whiten"] == (p.dim() == 2) for p in hyper(model).values())


def test_initial_state():
    guide, new = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([[5.0], [6.0]]))
    optimizer = Elementwise([guide])
    place = Place(optimizer, optimizer.param_groups[0], guide)
    assert initial_state(place, new) == {}
    optimizer.state[guide] = {"flag": True, "step": 0, "slow": guide.detach().clone(), "sum": torch.full((1, 2), 0.5)}
    made = initial_state(place, new)
    assert (made["flag"], made["step"]) == (True, 0)
    assert torch.equal(made["slow"], new)
    assert torch.equal(made["sum"], torch.full((2, 1), 0.5))
    optimizer.state[guide]["sum"] = torch.tensor([[0.1, 0.2]])  # of a step
    assert initial_state(place, new) == {"flag": True}


def test_an_optimizer_whose_groups_show_nothing_is_tried_on_copies():
    model = Bare(gain=False)
    optimizer = Elementwise(model.parameters())
    state = dict(optimizer.state)
    compiled = compile_eagerly(model)
    step(compiled, optimizer)
    assert how_often(model, optimizer) == {1}
    assert optimizer.state == state  # of the copies nothing stays
    before = {name: p.detach().clone() for name, p in hyper(model).items()}
    stir(model)
    step(compiled, optimizer)
    assert not any(torch.equal(p, before[name]) for name, p in hyper(model).items())


def only_matrices(model):
    return [Whitened(model.parameters())]


def head_alone(model):
    return [torch.optim.SGD(model.head.parameters(), lr=0.1)]


@pytest.mark.parametrize(("build", "count"), [(only_matrices, 8), pytest.param(head_alone, 12, marks=pytest.mark.slow)])
def test_parameters_that_no_optimizer_trains_are_named(build, count):
    model = Bare(gain=False)
    optimizers = build(model)
    compiled = compile_eagerly(model)
    with pytest.warns(
        mhc_compile.MhcWarning, match=rf"^{count} parameters .* {NOWHERE}: blocks\.0\.mhc\.attn\."
    ) as said:
        step(compiled, *optimizers)
    assert len(said) == 1
    assert "mhc_compile.attach(model, ...)" in str(said[0].message)
    for _ in range(3):
        step(compiled, *optimizers)  # once is enough
    assert len(hyper(model)) == 12


@pytest.mark.slow
def test_strict_refuses_parameters_that_no_optimizer_trains():
    model = Bare(gain=False)
    optimizer = Whitened(model.parameters())
    compiled = compile_eagerly(model, strict=True)
    with pytest.raises(AttachError, match=rf"8 parameters .* {NOWHERE}: blocks\.0\.mhc\.attn\.bias"):
        step(compiled, optimizer)


def by_name(model):
    """Whitened for the blocks' matrices, AdamW for a list of names: `bias` and `scale` in none."""
    return [
        Whitened(block_matrices(model)),
        torch.optim.AdamW([model.embed.weight, model.head.weight, model.gain], lr=1e-2),
    ]


def attached(**options):
    model = Bare()
    options = {"inner_backend": "eager", **options}
    mhc_compile.attach(model, tokens(), options=options)
    stir(model)
    return model, by_name(model), compile_eagerly(model, **options)


def test_parameters_that_a_selection_left_out_join_at_the_first_step():
    model, optimizers, compiled = attached()
    assert how_often(model, *optimizers) == {0, 1}
    before = {name: p.detach().clone() for name, p in hyper(model).items()}
    step(compiled, *optimizers)
    assert how_often(model, *optimizers) == {1}
    step(compiled, *optimizers)
    assert not any(torch.equal(p, before[name]) for name, p in hyper(model).items())


@pytest.mark.slow
def test_parameters_that_a_selection_left_out_are_warned_of():
    model, optimizers, compiled = attached(existing_optimizers="warn")
    with pytest.warns(
        mhc_compile.MhcWarning, match=r"8 .* in no optimizer: blocks\.0\.mhc\.attn\.bias|AdamW was built"
    ):
        step(compiled, *optimizers)
    assert how_often(model, *optimizers) == {0, 1}
    model, optimizers, compiled = attached(existing_optimizers="warn", strict=True)
    with pytest.raises(AttachError, match=r"in no optimizer|AdamW was built"):
        step(compiled, *optimizers)
    model, optimizers, compiled = attached(existing_optimizers="ignore", strict=True)
    step(compiled, *optimizers)
    assert how_often(model, *optimizers) == {0, 1}


def test_other_models_that_got_gradients_are_not_warned_of():
    other, model = Decoder(layers=1), Decoder(layers=1)
    loss_of(compile_eagerly(other)).backward()  # trained without any optimizer
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step(compile_eagerly(model), torch.optim.SGD(model.parameters(), lr=0.1))
        mhc_compile.detach(model)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(connection.phi.grad is not None for connection in mhc_compile.connections(other).values())
    assert not [one for one in said if "in no optimizer" in str(one.message)]


@pytest.mark.slow
def test_frozen_hyper_connections_join_nothing_until_they_are_trained():
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens())
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    compiled = compile_eagerly(model)
    step(compiled, optimizer)
    assert how_often(model, optimizer) == {0}
    model.blocks.requires_grad_(True)
    optimizer.add_param_group({"params": model.blocks.parameters()})
    step(compiled, optimizer)
    assert how_often(model, optimizer) == {1}


def head_first(model):
    """A model whose head is trained alone, as far as its user knows."""
    for part in (model.embed, model.blocks, model.norm):
        part.requires_grad_(False)
    return torch.optim.AdamW(model.head.parameters(), lr=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_a_group_that_is_added_later_takes_its_parameters_over(named):
    """The plain script: train the head, then unfreeze the rest. The oracle puts the parameters
    where they go by hand.
    """
    early = Decoder(layers=1)
    late = twin(early)
    optimizer, other = head_first(early), head_first(late)
    compiled, ahead = compile_eagerly(early), compile_eagerly(late, existing_optimizers="ignore")
    for its in (compiled, ahead):
        its(tokens())
    other.param_groups[0]["params"][:] = [*hyper(late).values(), *late.head.parameters()]
    for model in (early, late):
        stir(model)
    for model, its, optimizes in ((early, compiled, optimizer), (late, ahead, other)):
        for _ in range(2):
            step(its, optimizes)
        model.requires_grad_(True)
        backbone = (
            (name, p) if named and model is early else p
            for name, p in model.named_parameters()
            if not name.startswith("head")
        )
        if model is late:
            optimizes.param_groups[0]["params"][:] = list(late.head.parameters())
        elif named:
            optimizes.param_groups[0]["param_names"] = [name for name, _ in model.named_parameters()][: -2 - 2]
        optimizes.add_param_group({"params": backbone, "lr": 1e-3})
        for _ in range(2):
            step(its, optimizes)
    assert how_often(early, optimizer) == {1}
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, len(list(early.parameters())) - 2]
    assert_equal(early, late)


def test_a_group_takes_parameters_over():
    model = Decoder(layers=1)
    optimizer = head_first(model)
    mhc_compile.attach(model, tokens())
    assert groups_of(optimizer, model) == {"phi": {0}, "bias": {0}, "scale": {0}}
    optimizer.add_param_group({"params": (p for name, p in model.named_parameters() if "head" not in name)})
    assert groups_of(optimizer, model) == {"phi": {1}, "bias": {1}, "scale": {1}}


def test_an_optimizer_built_later_takes_its_parameters_over():
    model = Decoder(layers=1)
    first = head_first(model)
    mhc_compile.attach(model, tokens())
    assert how_often(model, first) == {1}
    model.requires_grad_(True)
    second = torch.optim.SGD([p for name, p in model.named_parameters() if not name.startswith("head")], lr=0.1)
    assert (how_often(model, first), how_often(model, second)) == ({0}, {1})
    third = torch.optim.SGD(model.parameters(), lr=0.1)  # of all, next to the others
    assert (how_often(model, second), how_often(model, third)) == ({1}, {1})


def test_parameters_that_the_user_put_in_two_groups_are_torch_s_error():
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": list(hyper(model).values())})


def one_each(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values())


def one_a_block(model):
    waiting = [{"optimizer": None, "left": 0, "size": 0} for _ in model.blocks]
    for block, entry in zip(model.blocks, waiting, strict=True):
        mine = list(block.parameters())
        optimizer = torch.optim.SGD(mine, lr=0.1)
        entry.update(optimizer=optimizer, left=len(mine), size=len(mine))

        def hook(p, optimizer=optimizer, entry=entry):
            entry["left"] -= 1
            if not entry["left"]:
                optimizer.step()
                optimizer.zero_grad()
                entry["left"] = entry["size"]

        for p in mine:
            p.register_post_accumulate_grad_hook(hook)
    return [entry["optimizer"] for entry in waiting]


def torch_s_own(model):
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return [o for p in model.parameters() for o in p._in_backward_optimizers]


SLOW = [pytest.param(build, marks=pytest.mark.slow) for build in (one_a_block, torch_s_own)]


@pytest.mark.parametrize("build", [one_each, *SLOW])
def test_optimizers_that_step_in_the_backward_take_nothing_and_are_named(build):
    model = Decoder(layers=2)
    optimizers = build(model)
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    compiled = compile_eagerly(model)
    with pytest.warns(mhc_compile.MhcWarning, match=r"12 parameters .* step within the backward .*: blocks\.0") as said:
        loss_of(compiled).backward()
    assert len(said) == 1
    loss_of(compiled).backward()
    assert how_often(model, *optimizers) == {0}
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)


@pytest.mark.slow
def test_strict_refuses_optimizers_that_step_in_the_backward():
    model = Decoder(layers=1)
    one_each(model)
    with pytest.raises(AttachError, match="step within the backward"):
        compile_eagerly(model, strict=True)(tokens())


def test_hooks_that_do_not_step_are_no_optimizer_in_the_backward():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    step(compile_eagerly(model), optimizer)
    assert how_often(model, optimizer) == {1}
    assert norms


@pytest.mark.slow
def test_two_models_in_one_function():
    def build():
        torch.manual_seed(0)
        student, teacher = Decoder(layers=1), Decoder(layers=1)
        return student, teacher

    def optimizers_of(student, teacher):
        return torch.optim.SGD(student.parameters(), lr=0.1), torch.optim.AdamW(teacher.parameters(), lr=0.01)

    def run(student, teacher, optimizers):
        @torch.compile(backend="mhc", options={"inner_backend": "eager"})
        def both(student, teacher):
            return student(tokens()).square().mean() + teacher(tokens()).square().mean()

        both(student, teacher)
        optimizers = optimizers or optimizers_of(student, teacher)
        for model in (student, teacher):
            stir(model)
        for _ in range(3):
            both(student, teacher).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return optimizers

    early, late = build(), build()
    for model in late:
        mhc_compile.attach(model, tokens())
    optimizers = run(*early, optimizers_of(*early))
    torch._dynamo.reset()
    run(*late, None)
    for model, other, optimizer in zip(early, late, optimizers, strict=True):
        assert [id(p) for p in listed(optimizer)] == [id(p) for p in model.parameters()]
        assert_equal(model, other)


def test_a_frozen_model_in_a_function_trains_with_what_is_trained_around_it():
    student, teacher = Decoder(layers=1), Decoder(layers=1)
    optimizer = head_first(teacher)

    @torch.compile(backend="mhc", options={"inner_backend": "eager"})
    def both(student, teacher):
        return student(tokens()) + teacher(tokens())

    both(student, teacher)
    assert how_often(teacher, optimizer) == {1}
    assert how_often(student, optimizer) == {0}


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def divided(model, **settings):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return [ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.02, **settings)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("buckets", [True, False])
def test_zero_divides_again(buckets):
    model, (optimizer,) = assert_trains_alike(
        lambda model: divided(model, parameters_as_bucket_view=buckets), plain=Decoder(layers=1)
    )
    optimizer.consolidate_state_dict()
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


@pytest.mark.usefixtures("one_process")
def test_zero_that_has_stepped_refuses():
    model = Decoder(layers=1)
    optimizers = divided(model)
    step(model, *optimizers)
    with pytest.raises(AttachError, match=r"ZeroRedundancyOptimizer has divided .* mhc_compile.attach\(model"):
        compile_eagerly(model)(tokens())


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_no_optimizer_is_tried_where_it_may_wait_for_other_processes():
    model = Bare(gain=False)
    optimizer = Elementwise(model.parameters())
    with pytest.warns(mhc_compile.MhcWarning, match=f"8 parameters .* {NOWHERE}"):
        step(compile_eagerly(model), optimizer)


def test_nothing_is_kept_of_parameters_that_joined():
    from mhc_compile.attachment import optimizer_groups

    gc.collect()
    known = len(optimizer_groups._joined)
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mhc_compile.attach(model, tokens())
    assert len(optimizer_groups._joined) == known + 6
    del model, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert len(optimizer_groups._joined) == known


class StackedMuon(torch.optim.Optimizer):
    """Muon groups, each of one shape, whose gradients are stacked, and groups for the rest."""

    def __init__(self, model: nn.Module, rest: list[nn.Parameter]) -> None:
        inside = list(model.blocks.parameters())
        shapes = sorted({parameter.shape for parameter in inside})
        stacks = [{"kind": "muon", "params": [p for p in inside if p.shape == shape]} for shape in shapes]
        super().__init__([{"kind": "sgd", "params": rest}, *stacks], {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["kind"] == "muon":
                left, _, right = torch.linalg.svd(torch.stack([p.grad for p in group["params"]]), full_matrices=False)
                for parameter, one in zip(group["params"], left @ right, strict=True):
                    parameter.sub_(one, alpha=group["lr"])
            else:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


def test_vectors_leave_groups_for_matrices_that_the_program_made():
    """Parameters that exist early are in the groups that a program makes of its blocks."""
    model = Decoder()
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
        if isinstance(module, nn.LayerNorm):
            module.weight = module.bias = None
    mhc_compile.attach(model, tokens(), options={"inner_backend": "eager"})
    new = [c.get_parameter(name) for c in mhc_compile.connections(model).values() for name in ("bias", "scale")]
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.phi.normal_()
    rest = [*model.embed.parameters(), *model.norm.parameters(), *model.head.parameters()]
    optimizer = StackedMuon(model, rest)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    before = [parameter.clone() for parameter in new]
    compiled(tokens()).square().mean().backward()
    optimizer.step()
    first, *stacks = optimizer.param_groups
    assert {id(parameter) for parameter in new} <= {id(parameter) for parameter in first["params"]}
    assert all(group["params"] and group["params"][0].dim() == 2 for group in stacks)
    assert all(not torch.equal(old, parameter) for old, parameter in zip(before, new, strict=True))
    state, places = optimizer.state_dict(), [len(group["params"]) for group in optimizer.param_groups]
    del optimizer, first, stacks
    gc.collect()
    again = StackedMuon(model, rest)
    again.load_state_dict(state)  # a program that resumes makes its groups as before
    assert [len(group["params"]) for group in again.param_groups] == places
