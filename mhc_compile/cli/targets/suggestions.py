"""Names similar to a wrong one, as the end of a message."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def near_names(name: str, known: Iterable[str], count: int = 3, *, prefix: str = "") -> str:
    """Return "; near names: one, other", each below `prefix`, or ""."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count) or [k for k in known if name and name in k][:count]
    return f"; near names: {', '.join(f'{prefix}.{entry}' if prefix else entry for entry in near)}" if near else ""


def near_files(path: str) -> str:
    """Return similar files in the directory of `path`, or say that it is missing."""
    directory, name = os.path.split(path)
    if directory and not os.path.isdir(directory):
        return f"; there is no directory {directory!r} either"
    suffix = os.path.splitext(name)[1]
    files = [entry for entry in sorted(os.listdir(directory or ".")) if entry.endswith(suffix)]
    return near_names(name, files) or (f"; there are {', '.join(files[:3])}" if files else "")
