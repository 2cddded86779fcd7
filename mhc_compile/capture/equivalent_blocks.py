"""The blocks of a model that share one compiled graph.

Where blocks are compiled one by one or separated by graph breaks, Dynamo compiles the first block
and reuses its graph for all blocks of the same structure. Hyper-connections change the structure:
attached one block at a time, each block would be compiled again until Dynamo hits its recompile
limit and runs the rest plain. Therefore all equivalent blocks get them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile import _torch
from mhc_compile._torch import OptimizedModule

if TYPE_CHECKING:
    from mhc_compile.capture.frame import Frame


@dataclass(frozen=True, eq=False)
class EquivalentBlocks:
    """The `number` of a module's block in its list, and the same module in equivalent blocks."""

    number: int
    others: dict[int, nn.Module]


def equivalent_blocks(module: nn.Module, frame: Frame) -> EquivalentBlocks:
    """Return the modules in the place of `module` in other blocks of its list.

    A list is a `ModuleList`, a `Sequential` or a `ModuleDict` of numbers.

    A block counts if it has the same class, the same parameter shapes, and is compiled by itself
    exactly if `module` is. The list is searched in the modules whose calls surround this one; if a
    function runs the blocks, there is none, and each block is traced by itself.
    """
    for call in frame.calls:
        whole = call.module
        if whole is module or isinstance(whole, OptimizedModule):
            continue
        path: list[str] = next((path.split(".") for path, other in whole.named_modules() if other is module), [])
        for length in reversed(range(len(path))):
            holder = whole.get_submodule(".".join(path[:length]))
            if _is_list(holder):
                return _others(holder, path[length], ".".join(path[length + 1 :]), module)
    return EquivalentBlocks(0, {})


def _is_list(holder: nn.Module) -> bool:
    numbered = isinstance(holder, nn.ModuleDict) and all(name.isdigit() for name in holder)
    return numbered or isinstance(holder, (nn.ModuleList, nn.Sequential))


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
