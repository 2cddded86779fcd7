"""Versions that were compiled without streams, which hyper-connections that come later make wrong.

What follows a graph break may be an add alone: no guard shows that its trunk has streams now.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from mhc_compile import _torch

if TYPE_CHECKING:
    from types import CodeType

_codes: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: Several threads may compile at the same time.
_lock = threading.Lock()


def remember(code: CodeType) -> None:
    """Record that `code` has a compiled version without streams, of any backend."""
    with _lock:
        _codes.add(code)


def forget() -> None:
    """Have all such code traced again at its next call."""
    with _lock:
        codes = tuple(_codes)
        _codes.clear()
    for code in codes:
        _torch.forget_compiled(code, all_entries=False)
