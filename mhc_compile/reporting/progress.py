"""The progress of a long command: a spinner and a bar on a terminal, lines in a log, or nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing; the interface of the other displays, to be entered as a context."""

    def phase(self, text: str) -> None:
        """Begin work without a known length: loading, compiling."""

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""

    def log(self, text: str) -> None:
        """Print a line where there is no bar that shows the same."""

    def count(self, text: str, total: int, done: int = 0) -> None:
        """Begin work of `total` units, `done` of which are done."""

    def advance(self, text: str = "", *, done: int | None = None) -> None:
        """Report `done` units as done, by default one more; `text` follows the name of the work."""

    def __exit__(self, *error: object) -> None:
        """End the display."""


class Lines(Silent):
    """Prints a line for every phase, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        """Print it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    phase = log = note

    def count(self, text: str, total: int, done: int = 0) -> None:
        """Print the name and the length of the work."""
        self.note(f"{text}, {done} of {total} done" if done else f"{text}, {total} in all")


class Bars(Silent):
    """Shows a spinner for phases and a bar for counted work.

    It redraws on calls only: a thread that redraws would run on a core that is being measured.
    """

    def __init__(self, console: Console) -> None:
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
        self._name = ""
        self._progress.start()

    def phase(self, text: str) -> None:
        """Show it until other work begins."""
        self.count(text, None)

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def count(self, text: str, total: int | None, done: int = 0) -> None:
        """Show the bar in the place of the last display."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._name, self._task = text, self._progress.add_task(text, total=total, completed=done)
        self._progress.refresh()

    def advance(self, text: str = "", *, done: int | None = None) -> None:
        """Move the bar."""
        assert self._task is not None, "`count` begins the work"
        step: dict[str, Any] = {"advance": 1} if done is None else {"completed": done}
        self._progress.update(self._task, description=f"{self._name} {text}".rstrip(), **step)
        self._progress.refresh()

    def __exit__(self, *error: object) -> None:
        """Remove the bar and restore the cursor."""
        self._progress.stop()


def choose_progress(console: Console, *, quiet: bool) -> Silent:
    """Return bars on a terminal, lines elsewhere, and nothing with `quiet`."""
    if quiet:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)
