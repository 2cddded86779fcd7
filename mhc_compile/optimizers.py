"""Optimizers that were built before the first compiled call.

Hyper-connections are attached during the first call of a compiled model. An optimizer that exists by then has never heard of their parameters, and
would train the model around them, silently. A hook before every optimizer step puts them where the parameters of their owner are.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from mhc_compile._warn import warn

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.connection import HyperConnection
    from mhc_compile.options import OptimizerPolicy

__all__ = ["expect"]


class _Waiting(NamedTuple):
    owner: weakref.ref[nn.Module]
    policy: OptimizerPolicy


#: Hyper-connections that no optimizer trains yet. Nothing here keeps a model alive, and every access is one atomic step: one thread may compile a
#: model while another one trains.
_waiting: weakref.WeakKeyDictionary[HyperConnection, _Waiting] = weakref.WeakKeyDictionary()
_hooked = False


def expect(connection: HyperConnection, owner: nn.Module, policy: OptimizerPolicy) -> None:
    """From now on, the first optimizer step that trains parameters of `owner` but not those of `connection` acts on `policy`."""
    global _hooked
    if policy == "off":
        return
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    _waiting[connection] = _Waiting(weakref.ref(owner), policy)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of a step hook
    if not _waiting:
        return
    place = {id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    left_out: list[str] = []
    for reference in _waiting.keyrefs():
        connection = reference()
        entry = _waiting.get(connection) if connection is not None else None
        owner = entry.owner() if entry is not None else None
        if connection is None or entry is None or owner is None:
            continue
        missing = [parameter for parameter in connection.parameters() if id(parameter) not in place]
        neighbours = [place[id(p)] for p in owner.parameters() if id(p) in place]
        if missing and not neighbours:
            continue  # this optimizer trains another part of the model
        _waiting.pop(connection, None)
        if missing and entry.policy == "warn":
            left_out.append(connection.extra_repr())
        elif missing:
            group, last = max(neighbours, key=lambda found: found[1])
            _insert(group, last, missing)
            place = {id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    if left_out:
        warn(
            f"{type(optimizer).__name__} was built before hyper-connections were attached and does not train {len(left_out)} of them."
            " Build it after mhc_compile.attach(model, ...), or use the option optimizer='join'"
        )


def _insert(group: dict[str, Any], last: int, parameters: list[nn.Parameter]) -> None:
    # Behind the owner's last parameter: where `model.parameters()` has them, so that an optimizer built after attaching has the same order and
    # can load this one's state. In the same list object, and in an old group, so that schedulers drive them.
    group["params"][last + 1 : last + 1] = parameters
