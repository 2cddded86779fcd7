"""Follow what a program does with modules, for `mhc run`: define, construct, load, save, train.

The names are public; torch has no hook there. Only torch itself is imported, not Dynamo: most
scripts below `mhc run` import this before they decide to compile anything.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType


def on_new_class(then: Callable[[type[nn.Module]], None]) -> None:
    """Patch `nn.Module` to call `then(kind)` with every subclass, those that exist included."""
    todo = nn.Module.__subclasses__()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        then(kind)

    def __init_subclass__(cls: type[nn.Module], /, **settings: Any) -> None:  # noqa: N807
        super(nn.Module, cls).__init_subclass__(**settings)
        then(cls)

    nn.Module.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


def on_construction(then: Callable[[nn.Module], None]) -> None:
    """Patch `nn.Module` to call `then(module)` as the constructor of an outermost module begins.

    A module that the constructor of another one makes is not an outermost one.
    """
    construct = nn.Module.__init__

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        construct(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and not _is_inside_another(self):
            then(self)

    nn.Module.__init__ = __init__  # type: ignore[method-assign]


def _is_inside_another(module: nn.Module) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner is not module:
                return True
        frame = frame.f_back
    return False


def call_first(module: nn.Module, decide: Callable[[nn.Module], None]) -> None:
    """Call `decide(module)` at the first call of `module`, before its forward."""

    def first(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)
        for part in module.modules():
            if getattr(part.__dict__.get("_compiled_call_impl"), "__name__", "") == "first":
                part._compiled_call_impl = None
        decide(module)
        return module(*args, **kwargs)

    module.__dict__["_compiled_call_impl"] = first


def before_loading(then: Callable[[nn.Module, Mapping[str, Any]], None]) -> None:
    """Patch `nn.Module.load_state_dict` to call `then(module, state)` before."""
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        then(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def after_saving(then: Callable[[Any, Any], None]) -> None:
    """Patch `torch.save` to call `then(object, file)` after."""
    torch.save = _followed(torch.save, then)


def after_saving_safetensors(module: Any, then: Callable[[Any, Any], None]) -> None:
    """Patch `safetensors.torch.save_file` to call `then(tensors, file)` after."""
    module.save_file = _followed(module.save_file, then)


def after_saving_distributed(module: Any, then: Callable[[Any, Any], None]) -> None:
    """Patch `DefaultSavePlanner` to call `then(state, folder)` as a distributed save begins."""
    plain = module.DefaultSavePlanner.set_up_planner

    @functools.wraps(plain)
    def set_up_planner(planner: Any, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        plain(planner, state_dict, storage_meta, is_coordinator)
        then(state_dict, getattr(storage_meta, "checkpoint_id", None))

    module.DefaultSavePlanner.set_up_planner = set_up_planner


def _followed(save: Callable[..., Any], then: Callable[[Any, Any], None]) -> Callable[..., Any]:
    @functools.wraps(save)
    def follow(content: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(content, file, *args, **kwargs)
        then(content, file)
        return result

    return follow


def on_backward(then: Callable[[], None]) -> None:
    """Patch `torch.autograd.backward` and `grad` to call `then()` before."""
    for name in ("backward", "grad"):
        setattr(torch.autograd, name, _after(then, getattr(torch.autograd, name)))


def _after(then: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        then()
        return function(*args, **kwargs)

    return both
