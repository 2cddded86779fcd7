"""Ctrl-C, but never in the middle of a step: a half-made step must not be saved."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Interrupts"]


class Interrupts:
    """While active, SIGINT raises KeyboardInterrupt at once, or at the end of the `shield` that it arrives in.

    Some callbacks swallow exceptions, KeyboardInterrupt among them; the end of the next shield raises it again.
    """

    def __init__(self) -> None:
        self.pending = False
        self._shielded = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Handles SIGINT in here. Does nothing outside the main thread, where Python delivers no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Puts SIGINT off until the end."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        self.check()

    def check(self) -> None:
        """Raises what was put off or swallowed.

        Raises:
            KeyboardInterrupt: SIGINT came.
        """
        if self.pending:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: Any) -> None:  # noqa: ARG002 - the signature of a signal handler
        self.pending = True
        if not self._shielded:
            raise KeyboardInterrupt
