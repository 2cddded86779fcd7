"""Callbacks for each compiled graph. Empty except under `mhc run`; does not import torch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.compilation.session import GraphSession

_observers: list[Callable[[GraphSession], None]] = []
#: Several threads may compile at the same time.
_lock = threading.Lock()


def observe(observer: Callable[[GraphSession], None]) -> Callable[[], None]:
    """Call `observer` with the session of each graph compiled from now on. Return an undo."""
    with _lock:
        _observers.append(observer)

    def end() -> None:
        with _lock:
            _observers.remove(observer)

    return end


def notify(session: GraphSession) -> None:
    """Call every observer with the session of a rewritten graph."""
    with _lock:
        observers = tuple(_observers)
    for observer in observers:
        observer(session)
