"""Callbacks for each compiled graph. Empty except under `mhc run`. Torch is not imported here."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.compilation.session import GraphSession

__all__ = ["notify", "observe"]

_observers: list[Callable[[GraphSession], None]] = []
#: Two threads may compile at the same time.
_lock = threading.Lock()


def observe(observer: Callable[[GraphSession], None]) -> Callable[[], None]:
    """Call `observer` with the session of each graph that is compiled from now on.

    Returns:
        A function that ends this.
    """
    with _lock:
        _observers.append(observer)

    def end() -> None:
        with _lock:
            _observers.remove(observer)

    return end


def notify(session: GraphSession) -> None:
    """Call every observer with the session of a graph that is rewritten."""
    with _lock:
        observers = tuple(_observers)
    for observer in observers:
        observer(session)
