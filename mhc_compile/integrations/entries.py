"""The entries of hyper-connections in what other packages save. No import of this loads torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = TypeVar("Value")

#: The attribute of a function that replaces another package's.
REGISTERED = "_mhc_registered"


def own(entries: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries of hyper-connections in a state dict."""
    from mhc_compile.checkpoints.reader import split_entry

    return {name: value for name, value in entries.items() if split_entry(name)}


def others(entries: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries of a state dict that belong to no hyper-connection."""
    ours = own(entries)
    return {name: value for name, value in entries.items() if name not in ours}
