"""Add the parameters of hyper-connections to optimizers that were built before.

Such an optimizer would silently train the model without them. So the parameters join it when they
are created, and gradient clipping and `GradScaler.unscale_` see them at the first step. A hook
before each optimizer step handles optimizers that could not be settled then.

Where a parameter goes:

1. To the group of a trained parameter of the same kind in its owner, the module that performs the
   add: `phi` to the last matrix, `bias` and `scale` to the last vector, preferably without weight
   decay. A user's split by decay, depth or optimizer thus holds for them too. (With the Trainer of
   transformers, which decays by name, `scale` goes with the matrices.)
2. If all of that kind are frozen in the owner (LoRA), to the nearest module around it that trains
   any; if there is none, to a parameter of another kind, in the same order of modules.
3. To all optimizers that have this parameter. If there is none, it waits.

They never get a group of their own. Schedulers keep lists by group: after a new group most of
torch's stop with an error or set wrong rates, schedules written by hand often know only group 0,
and a checkpoint fixes the number of groups. The price: an optimizer with one decayed group decays
`bias` and `scale` as it does the model's biases. `mhc_compile.parameter_groups` avoids that.
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
    Places = dict[int, list[tuple[Optimizer, Group]]]

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    owner: weakref.ref[nn.Module]
    root: weakref.ref[nn.Module]
    path: str
    policy: ExistingOptimizers


#: Hyper-connections that no optimizer trains yet, held weakly. Every access is one atomic step,
#: because one thread may compile a model while another trains.
_waiting: weakref.WeakKeyDictionary[HyperConnection, _Waiting] = weakref.WeakKeyDictionary()
#: Optimizers seen before a step: `_expected` and their number of parameters at that time.
_seen: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
_expected = 0
_hooked = False
_lock = threading.Lock()


def expect(
    connection: HyperConnection, owner: nn.Module, policy: ExistingOptimizers, *, root: nn.Module | None, path: str
) -> None:
    """Apply `policy` to optimizers that train `owner` but not `connection`, from now on.

    `root`, which has the owner at `path`, gives the order within a group.
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
    """Add expected parameters with the policy "extend" to the existing optimizers."""
    if _waiting:
        _settle(_torch.living_optimizers(), stepping=None)


def leave(parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters and their state from every optimizer."""
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
    """Apply the policy of every waiting hyper-connection. `stepping` is about to step."""
    places: Places = {}
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
            # A gated connection has no `scale`.
            like_matrix.update(p for name, p in connection.named_parameters() if name == "scale")
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
            f"{type(stepping).__name__} was built before hyper-connections were attached and does not train {left_out}"
            " of them. Build it after mhc_compile.attach(model, ...), or use the option existing_optimizers='extend'"
        )


def _scopes(owner: nn.Module, root: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the owner and the modules around it, innermost first."""
    yield owner
    try:
        inside = root.get_submodule(path) is owner
    except AttributeError:  # a function was traced; the path is not below this module
        inside = False
    while inside and path:
        path = path.rpartition(".")[0]
        yield root.get_submodule(path)


def _targets(
    parameter: nn.Parameter, scopes: list[nn.Module], places: Places, stepping: Optimizer | None, *, matrix: bool
) -> list[tuple[Optimizer, Group]]:
    """Return the groups that `parameter` joins, as the rules above say; `matrix`: like a matrix."""

    def targets(guide: nn.Parameter) -> list[tuple[Optimizer, Group]]:
        return [place for place in places.get(id(guide), ()) if _takes(place[0], parameter, stepping)]

    kinds: tuple[Callable[[nn.Parameter], bool], ...] = (lambda other: (other.dim() >= 2) == matrix, lambda _: True)
    for kind in kinds:
        for scope in scopes:
            trained = [other for other in _plain_parameters(scope) if other.requires_grad and kind(other)]
            found = [place for place in map(targets, trained) if place]
            if found:
                undecayed = [place for place in found if not any(group.get("weight_decay") for _, group in place)]
                return (undecayed if not matrix and undecayed else found)[-1]
            if trained:  # in no optimizer yet, so the parameter waits too
                break
    # All are frozen, but in an optimizer that may train them later.
    return next((place for place in map(targets, reversed(_plain_parameters(scopes[0]))) if place), [])


def _decayed_by_name(owner: nn.Module) -> bool:
    """Whether weight decay goes by parameter names.

    The Trainer of transformers decays all but biases and norms, so also `scale`. An optimizer that
    existed before attaching must have the same groups, so that each can load the other's state.
    """
    return "transformers.trainer" in sys.modules and type(owner).__module__.startswith("transformers.")


def _takes(optimizer: Optimizer, parameter: nn.Parameter, stepping: Optimizer | None) -> bool:
    if type(optimizer).__name__ == "Muon":  # takes matrices only
        return parameter.dim() == 2
    if isinstance(optimizer, LBFGS):  # within a step it holds vectors of the old size
        return optimizer is stepping or not _torch.lbfgs_has_memory(optimizer)
    return True


def _plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    mine = {id(p) for part in module.modules() if isinstance(part, HyperConnection) for p in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in mine]


class _Arrivals:
    """New parameters of one model by their groups.

    They are inserted in the order of `model.parameters()`, so that an optimizer built after
    attaching can load the state; and into the existing list, which wrappers and LBFGS reference.
    """

    def __init__(self, root: nn.Module) -> None:
        self._paths = {id(parameter): path for path, parameter in root.named_parameters()}
        self._order = {identity: i for i, identity in enumerate(self._paths)}
        self._groups: dict[int, tuple[Optimizer, Group, list[nn.Parameter]]] = {}

    def add(self, parameter: nn.Parameter, optimizer: Optimizer, group: Group) -> None:
        """Queue `parameter` for `group`."""
        # A wrapper's groups have the same lists as those of its optimizer.
        self._groups.setdefault(id(group["params"]), (optimizer, group, []))[2].append(parameter)

    def insert(self) -> None:
        """Insert all queued parameters."""
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
                # It creates its state when it is built; some versions of torch rely on that.
                fresh = Adagrad(newcomers, **{name: group[name] for name in optimizer.defaults})
                optimizer.state.update(fresh.state)
            log.info("%d parameters joined %s", len(newcomers), type(optimizer).__name__)

    def _prefix(self, group: Group) -> str | None:
        """Return the prefix of the group's names before paths in the root; None without names."""
        names: Collection[str] | None = group.get("param_names")
        if names is None or len(names) != len(group["params"]):
            return None
        for name, parameter in zip(names, group["params"], strict=True):
            path = self._paths.get(id(parameter))
            if path is not None and name.endswith(path):
                return name[: -len(path)]
        return ""
