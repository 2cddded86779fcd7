"""The structure of a model as plain data: what a plan must find again in another process.

A leaf is a string, "Linear weight[96, 32] bias[96]"; a module with children is a dict whose entry
"" is the module itself. Equal neighbours of a `ModuleList` share one entry, "0-11". The shapes of
parameters count inside the owners of sites alone: another vocabulary changes no residual add.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import HyperConnections, unwrap

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import nn

    Structure = dict[str, Any] | str

_RANGE = re.compile(r"(\d+)-(\d+)")


def structure_of(module: nn.Module, owners: Collection[str], path: str = "", *, inside: bool = False) -> Structure:
    """Describe `module`; `owners` are the paths of the modules whose parameters' shapes count."""
    module = _torch.without_wrappers(unwrap(module))
    while type(module).__module__.startswith("peft.") and isinstance(
        base := getattr(module, "base_layer", None), Module
    ):
        module = base  # an adapter around the module that was constructed
    inside = inside or path in owners
    text = _torch.plain_class(module).__qualname__
    if inside:
        own = module.named_parameters(recurse=False)
        text = " ".join([text, *(f"{name}{list(parameter.shape)}" for name, parameter in own)])
    children = {
        name: structure_of(child, owners, f"{path}.{name}".lstrip("."), inside=inside)
        for name, child in module.named_children()
        if not isinstance(child, HyperConnections)
    }
    return {"": text, **_fold(children)} if children else text


def fingerprint(structure: Structure) -> str:
    """Return a hash of the structure, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]


def difference(planned: Structure, found: Structure) -> str | None:
    """Return the first module that differs as a sentence; None if the structures are equal."""
    if planned == found:
        return None
    wants, has = dict(_entries(planned)), dict(_entries(found))
    for path in [*wants, *has]:
        name = f"module {path!r}" if path else "the model itself"
        if path not in has:
            return f"{name} ({wants[path]}) is missing from the model"
        if path not in wants:
            return f"{name} ({has[path]}) is not in the plan"
        if wants[path] != has[path]:
            return f"{name} is {wants[path]} in the plan and {has[path]} in the model"
    return "its modules have another order"


def _fold(children: dict[str, Structure]) -> dict[str, Structure]:
    """Give neighbours with equal structures one entry, by their range of numbers."""
    folded: dict[str, Structure] = {}
    run: list[str] = []
    for name, child in [*children.items(), ("", "")]:
        continues = run and name.isdigit() and int(name) == int(run[-1]) + 1 and child == children[run[-1]]
        if run and not continues:
            folded[run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}"] = children[run[0]]
            run = []
        if continues or name.isdigit():
            run.append(name)
        elif name:
            folded[name] = child
    return folded


def _entries(structure: Structure, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every module."""
    if isinstance(structure, str):
        yield path, structure
        return
    yield path, structure[""]
    children: Mapping[str, Structure] = structure
    for name, child in children.items():
        numbers = _RANGE.fullmatch(name)
        names = map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else [name] if name else []
        for each in names:
            yield from _entries(child, f"{path}.{each}".lstrip("."))
