"""Names near a wrong one, as the end of a message."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["near_files", "near_names"]


def near_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; near names: one, other`, or nothing."""
    known = list(known)
    near = (
        difflib.get_close_matches(name, known, n=count) or [other for other in known if name and name in other][:count]
    )
    return f"; near names: {', '.join(near)}" if near else ""


def near_files(path: str) -> str:
    """Files of the same kind in the directory of `path` with a name like its; its directory, if that is what is missing."""
    directory, name = os.path.split(path)
    if directory and not os.path.isdir(directory):
        return f"; there is no directory {directory!r} either"
    suffix = os.path.splitext(name)[1]
    files = [entry for entry in sorted(os.listdir(directory or ".")) if entry.endswith(suffix)]
    return near_names(name, files) or (f"; there are {', '.join(files[:3])}" if files else "")
