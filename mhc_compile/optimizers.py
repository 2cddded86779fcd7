"""Optimizers that were built before the first compiled call.

Hyper-connections are attached during the first call of a compiled model. An optimizer that exists by then has never heard of their parameters, and
would train the model around them, silently. A hook before every optimizer step puts them where the parameters of their owner are.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from mhc_compile._warn import warn

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.connection import HyperConnection
    from mhc_compile.options import OptimizerPolicy

__all__ = ["expect"]


class _Waiting:
    """A hyper-connection that no optimizer trains yet. Nothing here keeps a model alive."""

    def __init__(self, connection: HyperConnection, owner: nn.Module, policy: OptimizerPolicy) -> None:
        self.connection = weakref.ref(connection)
        self.owner = weakref.ref(owner)
        self.policy = policy


_waiting: list[_Waiting] = []
_hooked = False


def expect(connection: HyperConnection, owner: nn.Module, policy: OptimizerPolicy) -> None:
    """From now on, the first optimizer step that trains parameters of `owner` but not those of `connection` acts on `policy`."""
    global _hooked
    if policy == "off":
        return
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    _waiting.append(_Waiting(connection, owner, policy))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of a step hook
    if not _waiting:
        return
    place = {id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    still: list[_Waiting] = []
    left_out: list[str] = []
    for entry in _waiting:
        connection, owner = entry.connection(), entry.owner()
        if connection is None or owner is None:
            continue
        mine = list(connection.parameters())
        if all(id(parameter) in place for parameter in mine):
            continue
        if not any(id(p) in place for p in owner.parameters()):
            still.append(entry)  # this optimizer trains another part of the model
        elif entry.policy == "warn":
            left_out.append(connection.extra_repr())
        else:
            for name, parameter in connection.named_parameters():
                if id(parameter) not in place:
                    _insert(name, parameter, owner, place)
    _waiting[:] = still
    if left_out:
        warn(
            f"{type(optimizer).__name__} was built before hyper-connections were attached and does not train {len(left_out)} of them."
            " Build it after mhc_compile.attach(model, ...), or use the option optimizer='join'"
        )


def _insert(name: str, parameter: nn.Parameter, owner: nn.Module, place: dict[int, tuple[dict[str, Any], int]]) -> None:
    # In an old group, and in the same list object, so that schedulers drive it. Behind the owner's last parameter there: where
    # `model.parameters()` has it, so that an optimizer built after attaching has the same order and can load this one's state.
    known = {path: p for path, p in owner.named_parameters() if id(p) in place}
    neighbours = list(known.values())
    flat = parameter.dim() < 2 and not (name == "scale" and _grouped_by_name(owner))
    alike = [p for path, p in known.items() if (p.dim() < 2) == flat and "mhc" not in path.split(".")]
    group, _ = place[id((alike or neighbours)[-1])]
    last = max(place[id(p)][1] for p in neighbours if place[id(p)][0] is group)
    group["params"].insert(last + 1, parameter)
    for position in range(last + 1, len(group["params"])):
        place[id(group["params"][position])] = group, position


def _grouped_by_name(owner: nn.Module) -> bool:
    """Whether weight decay is decided by the names of parameters.

    Most loops decay matrices and leave vectors alone. The Trainer of transformers leaves biases and norms alone, and so decays `scale`: with an
    optimizer that it builds after attaching, this one must agree, or the one cannot load the other's state.
    """
    return "transformers.trainer" in sys.modules and type(owner).__module__.startswith("transformers.")
