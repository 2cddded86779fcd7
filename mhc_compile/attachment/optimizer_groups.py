"""Insert the parameters of hyper-connections into groups of optimizers, and take them out."""

from __future__ import annotations

import bisect
import logging
import weakref
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mhc_compile import _torch
from mhc_compile.attachment.optimizer_places import initial_state
from mhc_compile.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch

    from mhc_compile.attachment.optimizer_places import Group, Place

log = logging.getLogger(__name__)

WAYS_OUT = (
    "Build optimizers after mhc_compile.attach(model, ...), of all parameters; for an unmodified script, run it with"
    " `mhc run --plan mhc.json` (made by `mhc plan`)"
)
#: Parameters that joined an optimizer, and the parameter whose group they joined.
_joined: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Arrivals:
    """New parameters of one model by their groups.

    They are inserted in the order of `model.parameters()`, so that an optimizer built after
    attaching can load the state; and into the existing list, which wrappers and LBFGS reference.
    """

    def __init__(self, root: nn.Module) -> None:
        self._paths = {id(parameter): path for path, parameter in root.named_parameters()}
        self._order = {identity: i for i, identity in enumerate(self._paths)}
        self._groups: dict[int, tuple[Optimizer, Group, dict[nn.Parameter, Place]]] = {}

    def add(self, parameter: nn.Parameter, place: Place) -> None:
        """Queue `parameter` for the group of `place`."""
        # A wrapper's groups have the same lists as those of its optimizer.
        newcomers = self._groups.setdefault(id(place.group["params"]), (place.optimizer, place.group, {}))[2]
        newcomers.setdefault(parameter, place)

    def insert(self) -> None:
        """Insert all queued parameters."""
        _torch.before_adding_group(_hand_over)
        for optimizer, group, newcomers in self._groups.values():
            if not _torch.can_grow(optimizer):
                raise AttachError(
                    f"{type(optimizer).__name__} has divided its parameters among processes and stepped, so"
                    f" {len(newcomers)} parameters of hyper-connections cannot join it. {WAYS_OUT}"
                )
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
                state = initial_state(newcomers[parameter], parameter)
                group["params"].insert(index, parameter)
                if prefix is not None:
                    group["param_names"].insert(index, prefix + self._paths[id(parameter)])
                if state:
                    optimizer.state[parameter] = state
            if isinstance(optimizer, Adagrad):
                # It creates its state when it is built; some versions of torch rely on that.
                same = [nn.Parameter(parameter.detach()) for parameter in newcomers]
                fresh = Adagrad(same, **{name: group[name] for name in optimizer.defaults})
                optimizer.state.update(zip(newcomers, fresh.state.values(), strict=True))
            _torch.partition(optimizer)
            for parameter, place in newcomers.items():
                _joined[parameter] = weakref.ref(place.guide)
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


def move_out(parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
    """Remove parameters from an optimizer, and the groups that had nothing else."""
    filled = [group for group in optimizer.param_groups if group["params"]]
    leave(parameters, [optimizer])
    emptied = [id(group) for group in filled if not group["params"]]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in emptied]
    log.info("%d parameters moved out of %s, which trains matrices", len(parameters), type(optimizer).__name__)


def leave(parameters: Iterable[torch.Tensor], optimizers: Iterable[Optimizer] | None = None) -> None:
    """Remove parameters and their state from `optimizers`, by default from every optimizer."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in _torch.living_optimizers() if optimizers is None else optimizers:
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
                _torch.partition(optimizer)


def _hand_over(optimizer: Optimizer, parameters: list[torch.Tensor]) -> None:
    """Take parameters that joined other groups out of these; `optimizer` gets a group of them."""
    moving = [parameter for parameter in parameters if parameter in _joined]
    if not moving:
        return
    added = {id(parameter) for parameter in parameters}
    for other in _torch.living_optimizers():
        # An optimizer of the same model, guides included, may be meant to train them as well.
        mine = [p for p in moving if other is optimizer or id(_joined[p]()) not in added]
        if _torch.local_optimizer(other) is not None and (other is not optimizer or not _torch.can_grow(other)):
            continue  # it makes such an optimizer of its own
        state = {p: other.state[p] for p in mine if other is optimizer and p in other.state}
        leave(mine, [other])
        other.state.update(state)
    for parameter in moving:
        del _joined[parameter]
