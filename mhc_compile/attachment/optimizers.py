"""Optimizers that were built before the hyper-connections were attached.

An optimizer that exists by then has never heard of their parameters, and would train the model
around them, silently. So the parameters join it as soon as they exist: gradient clipping over its
groups and `GradScaler.unscale_` see them at the very first step. `_torch.living_optimizers` knows
the optimizers of the process. A hook before every optimizer step looks after what was not settled
then.

Where a parameter goes:

1. To the group of a trained parameter of its own kind in its owner, the module that performs the
   residual add: `phi` to the last matrix, `bias` and `scale` to the last vector, one without weight
   decay if there is any. So a user's split of decayed and other parameters, of learning rates by
   depth, or of matrices and vectors between two optimizers holds for them too. (With the Trainer of
   transformers, which decays by name, `scale` goes with the matrices.)
2. If all of that kind are frozen in the owner (LoRA), to the nearest module around it that trains
   any; if there is none, to a parameter of another kind, in the same order of modules.
3. Where that one is in several optimizers, the parameter is; where it is in none, the parameter
   waits.

Never to a group of its own. Schedulers keep lists by group: with a group that came later LambdaLR,
MultiplicativeLR, CosineAnnealingWarmRestarts, CyclicLR, ReduceLROnPlateau and SequentialLR stop
with an error (OneCycleLR, SWALR, ConstantLR and LinearLR also, or they drive it wrongly, unless it
has all keys of an old one), and schedules written by hand often know group 0 alone. The number of
groups is part of a checkpoint as well. The price: in an optimizer of one group with weight decay,
`bias` and `scale` are decayed as the biases of the model are. `mhc_compile.parameter_groups` makes
groups in which neither is.
"""

from __future__ import annotations

import bisect
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mhc_compile import _torch
from mhc_compile.errors import warn
from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from mhc_compile.config.options import ExistingOptimizers

    Group = dict[str, Any]

__all__ = ["expect", "leave", "settle"]

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    owner: weakref.ref[nn.Module]
    root: weakref.ref[nn.Module]
    path: str
    policy: ExistingOptimizers


#: Hyper-connections that no optimizer trains yet. Nothing here keeps a model alive, and every
#: access is one atomic step: one thread may compile a model while another one trains.
_waiting: weakref.WeakKeyDictionary[HyperConnection, _Waiting] = weakref.WeakKeyDictionary()
#: Optimizers that were looked at already: how much was expected then, and how many parameters they
#: had.
_seen: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
_expected = 0
_hooked = False
_lock = threading.Lock()


def expect(
    connection: HyperConnection,
    owner: nn.Module,
    policy: ExistingOptimizers,
    *,
    root: nn.Module | None = None,
    path: str = "",
) -> None:
    """From now on, `settle` and optimizer steps act on `policy` for optimizers that train `owner` but not `connection`.

    Args:
        connection: what is new.
        owner: the module it was attached to.
        policy: the option `optimizer`.
        root: a module around the owner, whose parameters give the order within a group.
        path: of the owner below the root.
    """
    global _hooked, _expected
    if policy == "ignore":
        return
    with _lock:
        if not _hooked:
            register_optimizer_step_pre_hook(_before_step)
            _hooked = True
        _expected += 1
    _waiting[connection] = _Waiting(weakref.ref(owner), weakref.ref(owner if root is None else root), path, policy)


def settle() -> None:
    """Lets expected parameters with the policy "extend" join the optimizers that exist."""
    if _waiting:
        _settle(_torch.living_optimizers(), stepping=None)


def leave(parameters: Iterable[nn.Parameter]) -> None:
    """Takes parameters of no model any more out of every optimizer, with their state."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in _torch.living_optimizers():
        for group in optimizer.param_groups:
            stay = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in gone]
            if len(stay) < len(group["params"]):
                if isinstance(optimizer, LBFGS):
                    _torch.restart_lbfgs(optimizer)
                for parameter in group["params"]:
                    if id(parameter) in gone:
                        optimizer.state.pop(parameter, None)
                for key in {"params", "param_names"} & group.keys():
                    group[key][:] = [group[key][i] for i in stay]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of a step hook
    if torch.compiler.is_compiling() or not _waiting:  # a compiled step is traced, and this with it
        return
    now = (_expected, sum(len(group["params"]) for group in optimizer.param_groups))
    if _seen.get(optimizer) == now:
        return
    _seen[optimizer] = now
    living = _torch.living_optimizers()
    if all(known is not optimizer for known in living):  # gc.freeze() hides what exists
        living.append(optimizer)
    _settle(living, stepping=optimizer)


def _settle(optimizers: list[Optimizer], *, stepping: Optimizer | None) -> None:
    """Acts on what waits. `stepping` is the optimizer before whose step this happens."""
    places: dict[int, list[tuple[Optimizer, Group]]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                places.setdefault(id(parameter), []).append((optimizer, group))
    arrivals: dict[int, _Arrivals] = {}
    left_out = 0
    for reference in _waiting.keyrefs():
        connection = reference()
        entry = _waiting.get(connection) if connection is not None else None
        owner, root = (entry.owner(), entry.root()) if entry is not None else (None, None)
        if connection is None or entry is None or owner is None or root is None:
            continue
        missing = [parameter for parameter in connection.parameters() if id(parameter) not in places]
        if not missing:
            _waiting.pop(connection, None)
            continue
        scopes = list(_scopes(owner, root, entry.path))
        like_matrix = {parameter for parameter in missing if parameter.dim() >= 2}
        if _decayed_by_name(owner):
            like_matrix.add(connection.scale)
        targets = {
            parameter: _targets(parameter, scopes, places, stepping, matrix=parameter in like_matrix)
            for parameter in missing
        }
        if entry.policy == "warn":
            if any(optimizer is stepping for found in targets.values() for optimizer, _ in found):
                left_out += 1
                _waiting.pop(connection, None)
            continue
        for parameter, found in targets.items():
            for optimizer, group in found:
                arrivals.setdefault(id(root), _Arrivals(root)).add(parameter, optimizer, group)
        if all(targets.values()):
            _waiting.pop(connection, None)
    for arrival in arrivals.values():
        arrival.insert()
    if left_out:
        warn(
            f"{type(stepping).__name__} was built before hyper-connections were attached and does not train {left_out} of them."
            " Build it after mhc_compile.attach(model, ...), or use the option existing_optimizers='extend'"
        )


def _scopes(owner: nn.Module, root: nn.Module, path: str) -> Iterator[nn.Module]:
    """The owner and the modules around it, inside out."""
    yield owner
    try:
        inside = root.get_submodule(path) is owner
    except AttributeError:  # what was traced is a function, and the path is not below this module
        inside = False
    while inside and path:
        path = path.rpartition(".")[0]
        yield root.get_submodule(path)


def _targets(
    parameter: nn.Parameter,
    scopes: list[nn.Module],
    places: dict[int, list[tuple[Optimizer, Group]]],
    stepping: Optimizer | None,
    *,
    matrix: bool,
) -> list[tuple[Optimizer, Group]]:
    """The groups that `parameter` is to join, beside a `matrix` or beside a vector: see the rules at the top of the file."""

    def targets(guide: nn.Parameter) -> list[tuple[Optimizer, Group]]:
        return [place for place in places.get(id(guide), ()) if _takes(place[0], parameter, stepping)]

    def alike(other: nn.Parameter) -> bool:
        return (other.dim() >= 2) == matrix

    kinds: tuple[Callable[[nn.Parameter], bool], ...] = (alike, lambda _: True)
    for kind in kinds:
        for scope in scopes:
            trained = [other for other in _plain_parameters(scope) if other.requires_grad and kind(other)]
            found = [place for place in map(targets, trained) if place]
            if found:
                undecayed = [place for place in found if not any(group.get("weight_decay") for _, group in place)]
                return (undecayed if not matrix and undecayed else found)[-1]
            if trained:  # by nobody so far; nor is what belongs to them
                break
    # All frozen, and yet in an optimizer: for later, when they are not.
    return next((place for place in map(targets, reversed(_plain_parameters(scopes[0]))) if place), [])


def _decayed_by_name(owner: nn.Module) -> bool:
    """Whether the names of parameters say which are decayed, and not their kinds.

    The Trainer of transformers leaves biases and norms alone, and so decays `scale`: an optimizer
    that it builds after attaching has `scale` among the matrices, and one that existed before must
    agree, or the one cannot load the other's state.
    """
    return "transformers.trainer" in sys.modules and type(owner).__module__.startswith("transformers.")


def _takes(optimizer: Optimizer, parameter: nn.Parameter, stepping: Optimizer | None) -> bool:
    if type(optimizer).__name__ == "Muon":  # torch's rejects anything but matrices, and so does the method
        return parameter.dim() == 2
    if isinstance(optimizer, LBFGS):  # in the middle of its step it holds vectors of the old size
        return optimizer is stepping or not _torch.lbfgs_has_memory(optimizer)
    return True


def _plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    mine = {id(p) for part in module.modules() if isinstance(part, HyperConnection) for p in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in mine]


class _Arrivals:
    """Parameters of one model on their way into groups.

    They are put where `model.parameters()` has them, so that an optimizer that is built after
    attaching has the same order and can load the state of this one; and into the list object that
    is there, which wrappers, and LBFGS itself, hold on to.
    """

    def __init__(self, root: nn.Module) -> None:
        self._paths = {id(parameter): path for path, parameter in root.named_parameters()}
        self._order = {identity: i for i, identity in enumerate(self._paths)}
        self._groups: dict[int, tuple[Optimizer, Group, list[nn.Parameter]]] = {}

    def add(self, parameter: nn.Parameter, optimizer: Optimizer, group: Group) -> None:
        """`parameter` is to join `group`."""
        # Wrappers show the groups of the optimizer that they wrap, whose list is the same.
        self._groups.setdefault(id(group["params"]), (optimizer, group, []))[2].append(parameter)

    def insert(self) -> None:
        """Puts everything in place."""
        for optimizer, group, newcomers in self._groups.values():
            newcomers = list({id(parameter): parameter for parameter in newcomers}.values())
            known = sorted(
                (self._order[id(parameter)], i)
                for i, parameter in enumerate(group["params"])
                if id(parameter) in self._order
            )
            prefix = self._prefix(group)
            if isinstance(optimizer, LBFGS):
                _torch.restart_lbfgs(optimizer)
            for parameter in sorted(newcomers, key=lambda new: self._order[id(new)], reverse=True):
                rank = bisect.bisect(known, (self._order[id(parameter)], -1))
                index = known[rank - 1][1] + 1 if rank else known[0][1] if known else len(group["params"])
                group["params"].insert(index, parameter)
                if prefix is not None:
                    group["param_names"].insert(index, prefix + self._paths[id(parameter)])
            if isinstance(optimizer, Adagrad):
                # Has its state from the beginning, and counts on it in some versions of torch.
                fresh = Adagrad(newcomers, **{name: group[name] for name in optimizer.defaults})
                optimizer.state.update(fresh.state)
            log.info("%d parameters joined %s", len(newcomers), type(optimizer).__name__)

    def _prefix(self, group: Group) -> str | None:
        """What the names in this group have before the path below our root; None where parameters have no names."""
        names: Collection[str] | None = group.get("param_names")
        if names is None or len(names) != len(group["params"]):
            return None
        for name, parameter in zip(names, group["params"], strict=True):
            path = self._paths.get(id(parameter))
            if path is not None and name.endswith(path):
                return name[: -len(path)]
        return ""
