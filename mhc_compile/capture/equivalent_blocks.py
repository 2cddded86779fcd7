"""The blocks of a model that share one compiled graph.

Where blocks are compiled one by one, or a graph break stands between them, Dynamo compiles the
first block and uses that graph for all the others, as long as they look the same. Blocks without
hyper-connections do not look like one with them: each would be traced, attached and compiled anew,
until Dynamo gives up at its limit of recompiles and runs the rest without. Whoever attaches to one
block therefore attaches to all that are like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile import _torch
from mhc_compile._torch import OptimizedModule

if TYPE_CHECKING:
    from mhc_compile.capture.frame import Frame

__all__ = ["EquivalentBlocks", "equivalent_blocks"]


@dataclass(frozen=True, eq=False)
class EquivalentBlocks:
    """The modules at one place of blocks that are alike, by the number of the block."""

    #: Number of the block that the question was asked for.
    number: int
    others: dict[int, nn.Module]


def equivalent_blocks(module: nn.Module, frame: Frame) -> EquivalentBlocks:
    """What stands in the place of `module` in the other blocks of its `nn.ModuleList` or `nn.Sequential`.

    A block counts if it has the same class and parameters of the same shapes, and is compiled by
    itself exactly if `module` is. Modules do not know their parents: the list is found below the
    modules whose calls surround this one. Where a function runs the blocks, there are none, and
    each block is traced for itself.
    """
    for call in frame.calls:
        whole = call.module
        if whole is module or isinstance(whole, OptimizedModule):
            continue
        path = next((path for path, one in whole.named_modules() if one is module), None)
        found = _in_list(whole, path.split("."), module) if path else None
        if found is not None:
            return found
    return EquivalentBlocks(0, {})


def _in_list(whole: nn.Module, path: list[str], module: nn.Module) -> EquivalentBlocks | None:
    """The equivalent blocks of `whole.path`, which is `module`; None where it is in no list."""
    for length in range(len(path) - 1, -1, -1):
        holder = whole.get_submodule(".".join(path[:length]))
        if isinstance(holder, (nn.ModuleList, nn.Sequential)):
            return _others(holder, path[length], ".".join(path[length + 1 :]), module)
    return None


def _others(blocks: nn.Module, name: str, path: str, module: nn.Module) -> EquivalentBlocks:
    shape = _shape(module)
    others: dict[int, nn.Module] = {}
    number = 0
    for position, (key, block) in enumerate(blocks.named_children()):
        if key == name:
            number = position
            continue
        try:
            other = block.get_submodule(path)
        except AttributeError:
            continue
        if other is not module and _shape(other) == shape:
            others[position] = other
    return EquivalentBlocks(number, others)


def _shape(module: nn.Module) -> tuple[Any, ...]:
    plain = _torch.original_module(module)
    parameters = ((name, tuple(value.shape)) for name, value in plain.named_parameters() if ".mhc." not in f".{name}")
    return type(module), type(plain), not _torch.has_compiled_call(module), tuple(parameters)
