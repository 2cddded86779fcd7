"""The names of the rows, for `--only`. Torch is not imported here: a wrong name is told at once."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LIMIT", "NAMES", "ONLY_WHEN_NAMED", "PLAIN", "UnknownNameError", "check_names"]

PLAIN, LIMIT = "plain", "limit"
#: Ours under other residual mappings. `--only` brings them in; a table of everybody has one of ours with the paper's.
ONLY_WHEN_NAMED = ("ours-identity", "ours-permutations", "ours-kronecker", "ours-unconstrained")
NAMES = (
    PLAIN,
    "ours",
    "ours-block",
    "ours-none",
    *ONLY_WHEN_NAMED,
    "deepseek-v4",
    "deepseek-v4-eager",
    "hyper-connections",
    "liger",
    "liger-eager",
    "tilekernels",
    LIMIT,
)


class UnknownNameError(MhcError):
    """There is no row of this name."""


def check_names(names: Iterable[str]) -> None:
    """Every name is one of `NAMES`.

    Raises:
        UnknownNameError: with the nearest names.
    """
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
            guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise UnknownNameError(f"--only {name!r}: there is no such contender; {guess}known: {', '.join(NAMES)}")
