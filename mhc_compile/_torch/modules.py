"""Modules and tensors: attributes that `torch.nn` and autograd keep under private names."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
from torch.utils.weak import TensorWeakRef as TensorWeakRef
from torch.utils.weak import WeakTensorKeyDictionary as WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor


#: The attributes that hold the module in what `torch.compile(module)` and `torch.distributed`'s
#: `checkpoint_wrapper(module)` return; they appear in the names of modules and parameters.
WRAPPED_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module")


def original_module(module: nn.Module) -> nn.Module:
    """Return the module inside the result of `torch.compile(module)`; any other module as it is."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside results of `torch.compile` and `checkpoint_wrapper`."""
    for name in WRAPPED_ATTRIBUTES:
        if (inner := module._modules.get(name)) is not None:
            return without_wrappers(inner)
    return module


def has_compiled_call(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module` is what `torch.compile` returned, or was compiled in place."""
    return isinstance(module, OptimizedModule) or has_compiled_call(module)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers registered on `module` itself, those that are None included."""
    return module._buffers


def set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put `value` back as the registered buffer `name`. No check and no hook of the module runs."""
    module._buffers[name] = value


def shallow_copy(module: nn.Module | None) -> nn.Module:
    """Return a module with the attributes of `module`; adding some does not change `module`."""
    copy = nn.Module()
    for name, value in (module.__dict__ if module is not None else {}).items():
        copy.__dict__[name] = dict(value) if name in {"_modules", "_parameters", "_buffers"} else value
    return copy


def named_parameter_slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what stands in the places of parameters, by path: tensors as well."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module._parameters.items():
            if value is not None:
                yield f"{path}.{name}" if path else name, value


def tensor_slots(model: nn.Module) -> list[dict[str, Any]]:
    """Return the dictionaries in which modules keep their parameters and buffers."""
    return [slots for module in model.modules() for slots in (module._parameters, module._buffers)]


def state_metadata(state: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Return the notes of modules in a state dict, by module path, or None if it has none."""
    metadata: dict[str, dict[str, Any]] | None = getattr(state, "_metadata", None)
    return metadata


def set_state_metadata(state: OrderedDict[str, Any], metadata: Mapping[str, dict[str, Any]]) -> None:
    """Give a state dict the notes of its modules, by module path."""
    state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]


def write_count(tensor: Tensor) -> int | None:
    """Return how often a tensor was written in place; None for an inference tensor."""
    return None if tensor.is_inference() else tensor._version


def has_hooks(tensor: Tensor) -> bool:
    """Return whether hooks wait for the gradient of a tensor."""
    return bool(tensor._backward_hooks)


class StartsOffMeta(nn.Module):
    """Base class of modules whose parameters get their start whenever they leave the meta device.

    `to_empty` gives them memory; `to(device)`, which has nothing to copy from the meta device, too.
    """

    def write_start(self, names: Iterable[str]) -> None:
        """Write the start of the parameters of these names."""
        raise NotImplementedError

    def leave_meta(self, device: torch.device | str) -> None:
        """Move the parameters that are on the meta device, and write their start."""
        self._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StartsOffMeta:
        before = [name for name, parameter in self.named_parameters(recurse=False) if parameter.is_meta]
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:
            if not before:
                raise
            self.leave_meta("cpu")
            super()._apply(fn, recurse)
            return self
        self.write_start([name for name in before if not self.get_parameter(name).is_meta])
        return self
