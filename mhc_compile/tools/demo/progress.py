"""What is shown on stderr while the demo works: bars on a terminal, a line now and then in a log, or nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from mhc_compile.tools.demo.training import Losses

__all__ = ["Bars", "Lines", "Silent", "choose_progress"]


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing, and is the interface of the others."""

    def phase(self, text: str) -> None:
        """Work that is not training begins: loading, compiling, validating."""

    def note(self, text: str) -> None:
        """Something that stays to be read."""

    def training(self, step: int, target: int) -> None:
        """Training begins at `step` of `target`."""

    def stepped(self, step: int, losses: Losses) -> None:
        """`step` steps are done; `losses` are the last one's."""

    def validated(self, step: int, target: int, losses: Losses) -> None:
        """Validation losses after `step` of `target` steps."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the display, whatever happened."""


class Lines(Silent):
    """One line for every phase and validation, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str) -> None:
        """Prints it."""
        self.note(text)

    def note(self, text: str) -> None:
        """Prints it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def validated(self, step: int, target: int, losses: Losses) -> None:
        """Prints both losses."""
        self.note(f"step {step} of {target}: validation loss {losses.plain:.4f} plain, {losses.mhc:.4f} mhc")


class Bars(Silent):
    """A spinner for the phases and a bar with both losses for the training."""

    def __init__(self, console: Console) -> None:
        self._phases = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), console=console, transient=True
        )
        self._steps = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._console = console
        self._shown: Progress | None = None

    def _show(self, bars: Progress | None) -> None:
        # Two live displays cannot share a terminal.
        if self._shown is not bars:
            if self._shown is not None:
                self._shown.stop()
            if bars is not None:
                bars.start()
            self._shown = bars

    def phase(self, text: str) -> None:
        """Shows it beside the spinner until the next."""
        for task in self._phases.task_ids:
            self._phases.remove_task(task)
        self._phases.add_task(text, total=None)
        self._show(self._phases)

    def note(self, text: str) -> None:
        """Prints it above the display."""
        self._console.print(text, markup=False, highlight=False)

    def training(self, step: int, target: int) -> None:
        """Shows the bar."""
        if not self._steps.task_ids:
            self._steps.add_task("training", total=target, completed=step, losses="")
        self._show(self._steps)

    def stepped(self, step: int, losses: Losses) -> None:
        """Moves the bar."""
        text = f"loss {losses.plain:.3f} plain, {losses.mhc:.3f} mhc"
        self._steps.update(self._steps.task_ids[0], completed=step, losses=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the display away and gives the cursor back."""
        self._show(None)


def choose_progress(console: Console, *, quiet: bool) -> Silent:
    """Bars on a terminal, lines elsewhere, nothing with `quiet`."""
    if quiet:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)
