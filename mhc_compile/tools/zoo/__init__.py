"""Tiny models of many families, each with its residual structure.

    zoo.get(NAME) ─> Family(name, make(layers), expected(layers, mode)) ─ check.check ─> Outcome

An `Outcome` says whether the finder sees the structure that the source has, and whether the
rewritten model computes the same as the plain one.

Each module of `families` has a dictionary `FAMILIES`, from a theme to its families. To add one,
write its model (or the config of a transformers model) and the formula of its chains, and put it
into the tuple of its theme; the tests find it there. The first call of `get` or `list_families`
imports torch; building a model of transformers imports transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from functools import cache
from typing import TYPE_CHECKING

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from mhc_compile.tools.zoo.family import Family

__all__ = ["UnknownFamilyError", "get", "list_families"]

#: The modules of `families`, in the order of reports.
_MODULES = (
    "transformer_blocks convolutional_networks sequences topology spelling boundaries torch_layers traps"
    " transformers_text transformers_vision transformers_signals".split()
)


class UnknownFamilyError(MhcError):
    """The zoo has no family or theme of this name."""


@cache
def _by_name() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in _MODULES:
        for group, families in importlib.import_module(f"{__name__}.families.{module}").FAMILIES.items():
            for family in families:
                assert family.name not in found, f"two families are called {family.name!r}"
                found[family.name] = dataclasses.replace(family, group=group)
    return found


def list_families(group: str | None = None) -> tuple[Family, ...]:
    """Return all families, or those of one theme, in the order of reports.

    Raises:
        UnknownFamilyError: there is no such theme.
    """
    families = _by_name().values()
    groups = dict.fromkeys(family.group for family in families)
    if group is not None and group not in groups:
        raise UnknownFamilyError(f"the zoo has no group {group!r}; expected one of {', '.join(groups)}")
    return tuple(family for family in families if group in {None, family.group})


def get(name: str) -> Family:
    """Return the family of this name.

    Raises:
        UnknownFamilyError: there is none; the message lists near names.
    """
    known = _by_name()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or [other for other in known if name in other][:5]
        hint = f"near names: {', '.join(near)}" if near else "`mhc zoo --list` lists them all"
        raise UnknownFamilyError(f"the zoo has no family {name!r}; {hint}")
    return known[name]
