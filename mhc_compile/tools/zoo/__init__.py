"""The zoo: tiny models of many families, and what their residual structure is.

    zoo.families() ─> Family(name, build(layers), expected(layers, mode)) ─ check.check ─> Outcome: does the finder see what the source says,
                                                                                         and does the rewritten model compute the same?

Each theme is a module with a tuple `FAMILIES`. To add a family, write its model (or the config of a transformers model), write the formula of its
chains after its source, and put it in the tuple of its theme; the tests find it there. torch is imported when the families are first asked for,
transformers when one of its models is built.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from typing import TYPE_CHECKING

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from mhc_compile.tools.zoo.family import Family

__all__ = ["GROUPS", "UnknownFamilyError", "families", "get"]

#: The themes, which are modules of `families`, in the order of reports.
GROUPS = (
    "transformer_blocks",
    "attention_variants",
    "convolutional_blocks",
    "dense_prediction",
    "sequences",
    "topology",
    "spelling",
    "boundaries",
    "torch_layers",
    "traps",
    "traps_on_trunk",
    "language",
    "mixture",
    "state_space",
    "encoders",
    "encoder_decoder",
    "vision",
    "convolutional",
    "multimodal",
    "audio_and_series",
)


class UnknownFamilyError(MhcError):
    """The zoo has no family of this name."""


@cache
def _by_name() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for group in GROUPS:
        for family in importlib.import_module(f"{__name__}.families.{group}").FAMILIES:
            assert family.name not in found, f"two families are called {family.name!r}"
            assert family.group == group, f"{family.name} says it is of {family.group!r} and lies in {group!r}"
            found[family.name] = family
    return found


def families(group: str | None = None) -> tuple[Family, ...]:
    """All families, or those of one theme.

    Raises:
        UnknownFamilyError: there is no such theme.
    """
    if group is not None and group not in GROUPS:
        raise UnknownFamilyError(f"the zoo has no group {group!r}; expected one of {', '.join(GROUPS)}")
    return tuple(family for family in _by_name().values() if group is None or family.group == group)


def get(name: str) -> Family:
    """The family of this name.

    Raises:
        UnknownFamilyError: there is none; the message lists near names.
    """
    known = _by_name()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or [other for other in known if name in other][:5]
        hint = f"near names: {', '.join(near)}" if near else "`mhc zoo --list` lists them all"
        raise UnknownFamilyError(f"the zoo has no family {name!r}; {hint}")
    return known[name]
