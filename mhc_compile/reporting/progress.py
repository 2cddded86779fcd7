"""What is shown on stderr while the benchmark works: a spinner and a bar on a terminal, lines in a log, or nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["Bars", "Lines", "Silent", "choose_progress"]


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing, and is the interface of the others."""

    def phase(self, text: str) -> None:
        """Work that is not timed begins: loading, compiling."""

    def note(self, text: str) -> None:
        """Something that stays to be read."""

    def timing(self, kind: str, turns: int) -> None:
        """Rounds begin, of so many turns together."""

    def advance(self, name: str) -> None:
        """The turn of `name` begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display, whatever happened."""


class Lines(Silent):
    """One line for every phase, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str) -> None:
        """Prints it."""
        self.note(text)

    def note(self, text: str) -> None:
        """Prints it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def timing(self, kind: str, turns: int) -> None:
        """Says so."""
        self.note(f"{kind}: timing, {turns} turns")


class Bars(Silent):
    """A spinner beside what is compiled; then a bar, whose turn it is, and how long it will take."""

    def __init__(self, console: Console) -> None:
        # Drawn when something moves and not by a thread of its own: that would run on a core that is being measured.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self._console = console
        self._task: TaskID | None = None
        self._kind = ""
        self._progress.start()

    def _replace(self, text: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=total)
        self._progress.refresh()

    def phase(self, text: str) -> None:
        """Shows it until the next."""
        self._replace(text, None)

    def note(self, text: str) -> None:
        """Prints it above the display."""
        self._console.print(text, markup=False, highlight=False)

    def timing(self, kind: str, turns: int) -> None:
        """Shows the bar."""
        self._kind = kind
        self._replace(f"{kind}: timing", turns)
        assert self._task is not None
        self._progress.update(self._task, completed=-1)

    def advance(self, name: str) -> None:
        """Moves it."""
        assert self._task is not None
        self._progress.update(self._task, advance=1, description=f"{self._kind}: timing {name}")
        self._progress.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the display away."""
        self._progress.stop()


def choose_progress(console: Console, *, quiet: bool) -> Silent:
    """Bars on a terminal, lines elsewhere, nothing with `quiet`."""
    if quiet:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)
