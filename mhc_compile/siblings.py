"""The blocks of a model that share one compiled graph.

Where blocks are compiled one by one, or a graph break stands between them, Dynamo compiles the first block and uses that graph for all the others, as
long as they look the same. Blocks without hyper-connections do not look like one with them: each would be traced, attached and compiled anew, until
Dynamo gives up at its limit of recompiles and runs the rest without. Whoever attaches to one block therefore attaches to all that are like it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhc_compile._torch import OptimizedModule

__all__ = ["Siblings", "siblings"]

#: How far above a module the list of blocks is looked for.
_HEIGHT = 4


@dataclass(frozen=True, eq=False)
class Siblings:
    """The modules at one place of blocks that are alike, by the number of the block."""

    #: Number of the block that the question was asked for.
    number: int
    others: dict[int, nn.Module]


def siblings(module: nn.Module) -> Siblings:
    """What stands in the place of `module` in the other blocks of its `nn.ModuleList` or `nn.Sequential`.

    A block counts if it has the same class and parameters of the same shapes, and is compiled by itself exactly if `module` is.
    """
    path: list[str] = []
    child = module
    for _ in range(_HEIGHT):
        found = _holder(child)
        if found is None:
            break
        holder, name = found
        if isinstance(holder, (nn.ModuleList, nn.Sequential)):
            return _in_list(holder, name, ".".join(reversed(path)), module)
        path.append(name)
        child = holder
    return Siblings(0, {})


def _holder(module: nn.Module) -> tuple[nn.Module, str] | None:
    """The one module that has `module` as a submodule, and its name there. Modules do not know their parents; the collector does."""
    found: list[tuple[nn.Module, str]] = []
    for table in gc.get_referrers(module):
        if not isinstance(table, dict):
            continue
        name = next((key for key, value in table.items() if value is module), None)
        if not isinstance(name, str):
            continue
        for owner in gc.get_referrers(table):
            # The table of submodules belongs to the module, or to the module's attributes where those are a dict of their own.
            candidates = [owner] if isinstance(owner, nn.Module) else _owners(owner, table)
            found += [(one, name) for one in candidates if one._modules is table]
    distinct = {id(owner): (owner, name) for owner, name in found}
    return next(iter(distinct.values())) if len(distinct) == 1 else None


def _owners(attributes: Any, table: dict[str, Any]) -> list[nn.Module]:
    if not isinstance(attributes, dict) or attributes.get("_modules") is not table:
        return []
    return [owner for owner in gc.get_referrers(attributes) if isinstance(owner, nn.Module)]


def _in_list(blocks: nn.Module, name: str, path: str, module: nn.Module) -> Siblings:
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
    return Siblings(number, others)


def _shape(module: nn.Module) -> tuple[Any, ...]:
    plain = module._orig_mod if isinstance(module, OptimizedModule) else module
    parameters = ((name, tuple(value.shape)) for name, value in plain.named_parameters() if ".mhc." not in f".{name}")
    return type(module), type(plain), module._compiled_call_impl is None, tuple(parameters)
