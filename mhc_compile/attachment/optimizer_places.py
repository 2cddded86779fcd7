"""Choose the optimizer groups that new parameters join.

Where a parameter goes:

1. To the group of a trained parameter of the same kind in its owner, the module that performs the
   add: `phi` to the last matrix, `bias` and `scale` to the last vector, preferably without weight
   decay. A user's split by decay, depth or optimizer thus holds for them too. (With the Trainer of
   transformers, which decays by name, `scale` goes with the matrices.)
2. If all of that kind are frozen in the owner (LoRA), or in optimizers that cannot train it, to the
   nearest module around it that trains any; if there is none, to a parameter of another kind, in
   the same order of modules.
3. To all optimizers that have this parameter. If there is none, it waits.

Whether an optimizer can train a parameter is read from whose code steps and from how its groups
are made, not from its name. Optimizers that step by torch's own code train any parameter (Muon:
matrices). Others may treat matrices apart: vectors go where vectors are, and matrices not where all
groups alike hold one shape, whose gradients may be stacked. Groups are alike if they have the same
settings but for numbers. As a last resort the optimizer's step is tried on copies.
"""

from __future__ import annotations

import collections
import copy
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import LBFGS, Muon, Optimizer

from mhc_compile import _torch
from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    Group = dict[str, Any]

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A group of an optimizer that trains `guide`."""

    optimizer: Optimizer
    group: Group
    guide: nn.Parameter


Places = dict[int, list[Place]]


def places_of(optimizers: Collection[Optimizer]) -> Places:
    """Return the places of all parameters in `optimizers`, by the parameter's `id`."""
    places: Places = {}
    local = {id(_torch.local_optimizer(optimizer)) for optimizer in optimizers}
    for optimizer in (optimizer for optimizer in optimizers if id(optimizer) not in local):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                places.setdefault(id(parameter), []).append(Place(optimizer, group, parameter))
    return places


def scopes_of(owner: nn.Module, root: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the owner and the modules around it, innermost first."""
    yield owner
    while path:
        path = path.rpartition(".")[0]
        yield root.get_submodule(path)


def find_places(
    parameter: nn.Parameter,
    scopes: list[nn.Module],
    places: Places,
    stepping: Optimizer | None,
    *,
    matrix: bool,
    last_resort: bool = False,
) -> list[Place]:
    """Return the places that `parameter` joins, as the rules above say; `matrix`: like a matrix.

    `stepping` is about to step, or has just stepped.
    """

    def targets(guide: nn.Parameter) -> list[Place]:
        known = places.get(id(guide), ())
        return [place for place in known if _takes(place, parameter, stepping, probe=last_resort)]

    kinds: tuple[Callable[[nn.Parameter], bool], ...] = (lambda other: (other.dim() >= 2) == matrix, lambda _: True)
    for kind in kinds:
        for scope in scopes:
            trained = [other for other in plain_parameters(scope) if other.requires_grad and kind(other)]
            found = [place for place in map(targets, trained) if place]
            if found:
                undecayed = [place for place in found if not any(one.group.get("weight_decay") for one in place)]
                return (undecayed if not matrix and undecayed else found)[-1]
            if trained and not any(id(other) in places for other in trained):
                break  # in no optimizer yet, so the parameter waits too
    # All are frozen, but in an optimizer that may train them later.
    return next((place for place in map(targets, reversed(plain_parameters(scopes[0]))) if place), [])


def decayed_by_name(owner: nn.Module) -> bool:
    """Whether weight decay goes by parameter names.

    The Trainer of transformers decays all but biases and norms, so also `scale`. An optimizer that
    existed before attaching must have the same groups, so that each can load the other's state.
    """
    return "transformers.trainer" in sys.modules and type(owner).__module__.startswith("transformers.")


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `module` but those of hyper-connections."""
    mine = {id(p) for part in module.modules() if isinstance(part, HyperConnection) for p in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in mine]


def initial_state(place: Place, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the state that the optimizer gave parameters like this one when it was built.

    Such are flags ("use_muon"), and tensors that are constant or equal to the parameter. State of
    later steps is left out but for flags. Torch's own optimizers make state when they step.
    """
    optimizer, group, guide = place
    if steps_by_torch(optimizer):
        return {}
    if (guide.dim() >= 2) != (parameter.dim() >= 2):
        guide = next((p for p in group["params"] if (p.dim() >= 2) == (parameter.dim() >= 2)), guide)
    given = optimizer.state.get(guide, {})
    made = {key: _initial(value, guide, parameter) for key, value in given.items()}
    if any(value is NotImplemented for value in made.values()):
        return {key: value for key, value in made.items() if isinstance(value, bool | str)}
    return made


def _initial(value: Any, guide: nn.Parameter, parameter: nn.Parameter) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return copy.deepcopy(value)
    if value.shape == guide.shape and torch.equal(value, guide.to(value)):
        return parameter.detach().clone()
    if value.shape == guide.shape and bool((value == value.flatten()[0]).all()):
        return torch.full_like(parameter, value.flatten()[0].item(), dtype=value.dtype)
    return NotImplemented


def steps_by_torch(optimizer: Optimizer) -> bool:
    """Whether torch's own code makes the optimizer's step."""
    return str(inspect.unwrap(type(optimizer).step).__module__).startswith("torch.")


def _takes(place: Place, parameter: nn.Parameter, stepping: Optimizer | None, *, probe: bool) -> bool:
    optimizer, group, _ = place
    if isinstance(optimizer, LBFGS):  # within a step it holds vectors of the old size
        return optimizer is stepping or not _torch.lbfgs_has_memory(optimizer)
    if _torch.steps_in_backward(optimizer):
        return False
    if steps_by_torch(optimizer):
        return parameter.dim() == 2 or not isinstance(optimizer, Muon)
    alike = _alike(optimizer, group)
    vectors = any(known.dim() < 2 for members in alike for known in members)
    mixed = any(len({known.shape for known in members}) > 1 for members in alike)
    shapes = {known.shape for known in group["params"]}
    if vectors or (parameter.dim() >= 2 and (mixed or shapes == {parameter.shape})):
        return True
    return probe and _trains(place, parameter)


def misplaced(optimizer: Optimizer, new: Collection[int]) -> list[nn.Parameter]:
    """Return the vectors among `new`, by `id`, that stand where the program puts matrices alone.

    Such a program collects the parameters of its blocks, which have no vectors, for an optimizer
    like Muon.
    """
    if steps_by_torch(optimizer) and not isinstance(optimizer, Muon):
        return []
    found = []
    for group in optimizer.param_groups:
        plain = [known for members in _alike(optimizer, group) for known in members if id(known) not in new]
        if plain and all(known.dim() >= 2 for known in plain):
            found += [known for known in group["params"] if id(known) in new and known.dim() < 2]
    return found


def _alike(optimizer: Optimizer, group: Group) -> list[list[nn.Parameter]]:
    """Return the parameters of each group that has the same settings but for numbers."""
    return [other["params"] for other in optimizer.param_groups if _settings(other) == _settings(group)]


def _settings(group: Group) -> tuple[frozenset[str], frozenset[tuple[str, Any]]]:
    """Return the names of a group's settings, and those that are no numbers."""
    kinds = {name: value for name, value in group.items() if isinstance(value, bool | str)}
    return frozenset(group), frozenset(kinds.items())


def _trains(place: Place, parameter: nn.Parameter) -> bool:
    """Whether the optimizer's step, on copies, moves `parameter` next to two parameters it has."""
    optimizer, group, guide = place
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # a step may wait for other processes
    copies = [nn.Parameter(torch.ones_like(p)) for p in (guide, guide, parameter)]
    for one in copies:
        one.grad = torch.full_like(one, 0.5)
    state: dict[torch.Tensor, Any] = {one: initial_state(place, one) for one in copies}
    double = object.__new__(type(optimizer))
    double.__dict__.update(optimizer.__dict__)
    double.param_groups = [{**group, "params": copies}]
    double.state = collections.defaultdict(dict, {one: made for one, made in state.items() if made})
    try:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(double)
    except Exception:  # what a user's optimizer raises for a parameter that it cannot train is unknown
        log.debug("%s does not train %s", type(optimizer).__name__, tuple(parameter.shape), exc_info=True)
        return False
    return all(bool(one.isfinite().all()) and not bool((one == 1).all()) for one in copies)
