"""Find lists and copies of a model's parameters that were made before its hyper-connections.

Programs make `params = list(model.parameters())` once and clip, zero or average by it. New
parameters are not in it, and no hook of torch sees its use. Variables on the Python stack and
attributes of their objects are searched, once for each model.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import OrderedDict
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.attachment.optimizer_places import plain_parameters
from mhc_compile.errors import warn

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_INSIDE = tuple(os.path.dirname(str(sys.modules[name].__file__)) + os.sep for name in ("torch", "mhc_compile"))

_GRADIENTS = frozenset({"grad", "clip_grad_norm_", "clip_grad_value_", "clip_grad_norm", "clip_grads_with_norm_"})


def warn_of_lists(root: nn.Module) -> None:
    """Warn of a list of the parameters of `root` that lacks those of hyper-connections.

    A variable counts if its function handles gradients, an attribute if it has all parameters that
    are trained; others are made for optimizers.
    """
    plain = {id(parameter): parameter.requires_grad for parameter in plain_parameters(root)}
    new = {id(parameter) for parameter in root.parameters()} - plain.keys()
    trained = {identity for identity, trains in plain.items() if trains}
    for label, value, frame in _values():
        if not _is_list_of_tensors(value):
            continue
        held = {id(one) for one in value}
        if len(held & plain.keys()) < 2 or held & new:
            continue
        if trained <= held if frame is None else not _GRADIENTS.isdisjoint(frame.f_code.co_names):
            warn(
                f"`{label}` is a list of {len(held & plain.keys())} parameters of {type(root).__name__}, made before it"
                " got hyper-connections: gradient clipping, zeroing or averaging by it leaves them out. Make the list"
                " after mhc_compile.attach(model, ...), or use model.parameters() in its place"
            )
            return


def warn_of_copies(root: nn.Module, trained: Container[int]) -> None:
    """Warn of a copy of `root` or of its parameters that lacks the hyper-connections.

    Copies are attributes of objects, or frozen models that are still equal to this one. Their
    parameters are not among those of optimizers, `trained`, by `id`.
    """
    plain = {id(parameter) for parameter in plain_parameters(root)}
    named = {name: p.shape for name, p in root.named_parameters() if id(p) in plain}
    for label, value, frame in _values():
        if issubclass(type(value), nn.Module):
            found = _is_twin(value, root, named) and (frame is None or _is_frozen_copy(value, root))
            found = found and not any(id(parameter) in trained for parameter in value.parameters())
        elif type(value) in (dict, OrderedDict):
            shapes = {name: getattr(one, "shape", None) for name, one in value.items()}
            found = frame is None and named.items() <= shapes.items() and not shapes.keys() & _new(root)
        else:
            found = frame is None and _is_list_of_tensors(value) and [one.shape for one in value] == [*named.values()]
            found = found and plain.isdisjoint(map(id, value))
        if found and len(named) > 1:
            warn(
                f"`{label}` has a copy of the parameters of {type(root).__name__} without its hyper-connections. If it"
                " averages the model, by position it mixes parameters up, by name it leaves the hyper-connections"
                " out. Make it after mhc_compile.attach(model, ...)"
            )
            return


def _new(root: nn.Module) -> set[str]:
    return {f"{path}.{name}" for path, part in connections(root).items() for name, _ in part.named_parameters()}


def _is_twin(value: nn.Module, root: nn.Module, named: dict[str, torch.Size]) -> bool:
    twin, model = unwrap(value), unwrap(root)
    if type(twin) is not type(model) or twin is model or connections(twin):
        return False
    return {name: p.shape for name, p in twin.named_parameters()} == named


def _is_frozen_copy(value: nn.Module, root: nn.Module) -> bool:
    if any(parameter.requires_grad for parameter in value.parameters()):
        return False
    pairs = zip(value.parameters(), plain_parameters(root), strict=True)
    return all(one.device == other.device and torch.equal(one, other) for one, other in pairs)


def _is_list_of_tensors(value: Any) -> bool:
    if type(value) not in (list, tuple, set) or len(value) < 2 or not isinstance(next(iter(value)), torch.Tensor):
        return False
    return all(isinstance(one, torch.Tensor) for one in value)


def _values() -> Iterator[tuple[str, Any, FrameType | None]]:
    """Yield (label, value, frame) of the user's variables; frame None for attributes."""
    frame: FrameType | None = sys._getframe(1)
    seen: set[int] = set()
    while frame is not None:
        if not os.path.abspath(frame.f_code.co_filename).startswith(_INSIDE):
            for name, value in [*_locals(frame).items(), *frame.f_globals.items()]:
                yield name, value, frame
                if id(value) not in seen:
                    seen.add(id(value))
                    for attribute, part in _attributes(value):
                        yield f"{name}.{attribute}", part, None
        frame = frame.f_back


def _locals(frame: FrameType) -> dict[str, Any]:
    """Return the local variables. Before Python 3.13 the frame keeps the dict and the model."""
    kept = frame.f_locals
    found = dict(kept)
    # Three references: of the frame, of this function, and of the call. More if locals() is in use.
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(kept) is dict and sys.getrefcount(kept) <= 3:
        kept.clear()
    return found


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return the attributes of an object of a user's class, without running its code."""
    kind = type(value)
    inside = str(kind.__module__).partition(".")[0] in {"torch", "mhc_compile", "builtins"}
    if inside or issubclass(kind, type | ModuleType | FunctionType):
        return []
    try:
        found = dict(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return []
    if issubclass(kind, nn.Module) and "training" in found:
        found.update(value.named_children())
    # The state of an optimizer may have the parameters' shapes.
    return [(name, part) for name, part in found.items() if not issubclass(kind, Optimizer) or name != "state"]
