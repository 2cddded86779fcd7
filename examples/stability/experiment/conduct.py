"""All runs: two processes of one thread each, one variant a process, and how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiment.plan import VARIANTS, ExperimentError

if TYPE_CHECKING:
    from rich.console import Console

    from experiment.plan import Plan

__all__ = ["conduct", "script", "surroundings"]

script = Path(__file__).parents[1] / "run.py"


def surroundings() -> dict[str, str]:
    """The environment of every process that trains or measures: one thread, which never spins."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def conduct(plan: Plan, folder: Path, processes: int, console: Console) -> None:
    """Runs what is not finished. Ctrl-C ends the processes; finished runs are files, and the next call goes on from there.

    Raises:
        ExperimentError: a process failed, or a finished run was made with other settings.
    """
    runs = list(plan.runs())
    done = [run for run in runs if plan.finished(folder, run) is not None]
    waiting = [
        name
        for name in VARIANTS
        if name in plan.variants and any(run.variant == name and run not in done for run in runs)
    ]
    if not waiting:
        return
    with _Bars(console, len(runs), len(done)) as bars, ExitStack() as stack:
        events: Queue[tuple[_Worker, dict[str, Any] | None]] = Queue()
        active: list[_Worker] = []
        while waiting or active:
            while waiting and len(active) < processes:
                active.append(stack.enter_context(_Worker(plan, waiting.pop(0), folder, events)))
            worker, event = events.get()
            if event is not None:
                bars.show(worker.variant, event)
                continue
            active.remove(worker)
            bars.forget(worker.variant)
            worker.check()


class _Worker:
    """A process that trains one variant. Its errors go to a file beside the runs."""

    def __init__(self, plan: Plan, variant: str, folder: Path, events: Queue[Any]) -> None:
        self.variant = variant
        self.log = folder / "runs" / f"{variant}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), "--out", str(folder), "--plan", plan.to_json(), "--worker", variant]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=surroundings())
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: Queue[Any]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                events.put((self, json.loads(line)))
        self.process.wait()
        events.put((self, None))

    def check(self) -> None:
        """Raises if the process has failed."""
        if self.process.returncode:
            lines = self.log.read_text().strip().splitlines() or ["it left no message"]
            raise ExperimentError(
                f"the process of {self.variant} ended with {self.process.returncode}: {lines[-1]}\nAll of it: {self.log}"
            )
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class _Bars:
    """On a terminal a bar for all runs and one for every process; elsewhere a line for every finished run."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self.total, self.done = total, done
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.all = self.bars.add_task("runs", total=total, completed=done, loss="")
        self.tasks: dict[str, Any] = {}
        self.losses: dict[str, float] = {}

    def show(self, variant: str, event: dict[str, Any]) -> None:
        if variant not in self.tasks:
            self.tasks[variant] = self.bars.add_task(variant, total=None, loss="")
        task = self.tasks[variant]
        if event["kind"] == "preparing":
            self.bars.update(task, description=f"{variant}: attaching and compiling")
        elif event["kind"] == "begin":
            self.bars.reset(task, total=None, description=event["run"], loss="")
        elif event["kind"] == "step":
            self.losses[variant] = event["loss"]
            self.bars.update(task, completed=event["step"], loss=f"loss {event['loss']:.3f}")
        elif event["kind"] == "end":
            self.done += 1
            self.bars.update(self.all, completed=self.done)
            self.console.print(
                f"{self.done} of {self.total} runs: {event['run']}, last loss {self.losses.get(variant, float('nan')):.4f}",
                highlight=False,
            )

    def forget(self, variant: str) -> None:
        if variant in self.tasks:
            self.bars.remove_task(self.tasks.pop(variant))

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()
