"""Runs of further seeds, in processes of their own, at the same time as the run that is shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.errors import MhcError
from mhc_compile.reporting.conditions import available_cores
from mhc_compile.tools.demo import CHECKPOINT, LOG, RESULT

if TYPE_CHECKING:
    from pathlib import Path

    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.demo import Settings

#: Seconds that an interrupted run has for its checkpoint.
PATIENCE = 60.0


class OtherSeeds:
    """A context in which `mhc demo` runs for the `count` seeds after that of `settings`.

    As many at a time as there are cores without work. A run has the folder `seed-N` in `folder`,
    for its checkpoint and files; with `resume` it continues the checkpoint that it finds there.
    What still runs at the end of the context is interrupted, and leaves a checkpoint.
    """

    def __init__(self, settings: Settings, count: int, steps: int, folder: Path, *, resume: bool) -> None:
        self.settings = [replace(settings, seed=settings.seed + 1 + i) for i in range(count)]
        self.steps, self.folder, self.resume = steps, folder, resume
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended, self._change = False, threading.Lock()
        self._results: dict[int, Future[dict[str, Any]]] = {}

    def __enter__(self) -> OtherSeeds:
        self._pool = ThreadPoolExecutor(max(1, available_cores() // torch.get_num_threads() - 1))
        self._results = {one.seed: self._pool.submit(self._run, one) for one in self.settings}
        return self

    def results(self, progress: Silent) -> list[dict[str, Any]]:
        """Wait for all runs. Return the content of their `result.json`, by seed.

        A run that failed is left out, with a note that names its messages.
        """
        found = []
        for seed, result in self._results.items():
            if not result.done():
                progress.phase(f"waiting for seed {seed}")
            try:
                found.append(result.result())
            except MhcError as error:
                progress.note(str(error))
        return found

    def _run(self, settings: Settings) -> dict[str, Any]:
        folder = self.folder / f"seed-{settings.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mhc_compile", "demo", "--quiet", "--seeds", "1", "--out", str(folder)]
        for name, value in {**asdict(settings), "steps": self.steps}.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        if self.resume and (folder / CHECKPOINT).exists():
            command.append("--resume")
        with (folder / LOG).open("w") as log:
            with self._change:
                if self._ended:
                    raise MhcError(f"seed {settings.seed} was not begun")
                # A session of its own: a Ctrl-C in the terminal reaches it once, from `__exit__`.
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
                self._running.add(process)
            code = process.wait()
        self._running.discard(process)
        if code:
            said = (folder / LOG).read_text().strip().splitlines() or ["it left no message"]
            raise MhcError(f"Seed {settings.seed} failed and is left out: {said[-1]} (all of it: {folder / LOG})")
        return json.loads((folder / RESULT).read_text())  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        with self._change:
            self._ended = True
            for process in list(self._running):
                process.send_signal(signal.SIGINT)
        for process in list(self._running):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._pool.shutdown(cancel_futures=True)
