"""A run from its beginning to its files: checkpoint, training, Ctrl-C, figures."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile._torch.benchmarking import caches, warm_up
from mhc_compile.errors import MhcError, OptionError
from mhc_compile.tools.demo import CHECKPOINT, PICTURE, RESULT, STEPS, Settings
from mhc_compile.tools.demo.data import load_corpus, make_task
from mhc_compile.tools.demo.report import collect, conditions, draw
from mhc_compile.tools.demo.seeds import OtherSeeds
from mhc_compile.tools.demo.train import EVERY, PairedTraining, deterministic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mhc_compile.reporting.progress import Silent
    from mhc_compile.results import Explanation

#: First entry of every checkpoint; changes with its layout.
FORMAT = "mhc demo checkpoint 2"


@contextmanager
def shield() -> Iterator[None]:
    """Defer Ctrl-C to the end of the context: a half-made step must not be saved.

    Does nothing outside the main thread, where Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        raise KeyboardInterrupt


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write all of `content` or nothing: a killed process leaves the previous checkpoint.

    Raises:
        MhcError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with _written(path):
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        MhcError: it does not exist, cannot be read, or has another format.
    """
    way_out = "Leave --resume out to start over, or name another folder with --out"
    if not path.exists():
        raise MhcError(f"there is no checkpoint {path} to resume. {way_out}")
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader meets
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        size = path.stat().st_size
        raise MhcError(f"the checkpoint {path} ({size} bytes) is damaged: {reason}. {way_out}") from error
    found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise MhcError(f"{path} is no checkpoint of this demo: its format is {found!r}, expected {FORMAT!r}. {way_out}")
    return content  # type: ignore[no-any-return]


@dataclass
class Session:
    """A run in a folder, as requested on the command line."""

    out: Path  # folder of the checkpoint, `result.json` and `loss.png`
    given: Mapping[str, Any]  # the named settings; the rest are the defaults, or those of the resumed checkpoint
    steps: int | None  # the length of the run, None for the default or the checkpoint's
    seeds: int  # how many seeds to run, from that of the settings on
    resume: bool  # whether to continue the checkpoint in `out`
    save_every: float  # seconds between two checkpoints
    progress: Silent  # the display on stderr
    saved: int = 0  # step of the checkpoint on disk, 0 before there is one

    def run(self) -> tuple[dict[str, Any], Explanation, list[Path]]:
        """Run all of it. Return the figures of `report.collect`, the site report, and the files.

        Raises:
            OptionError: the checkpoint has other settings or data, or is further than `steps`.
            MhcError: there is no usable checkpoint, no data, or a file cannot be written.
            KeyboardInterrupt: Ctrl-C came. If a step was done, a checkpoint is on disk.
        """
        self.checkpoint = self.out / CHECKPOINT
        with _written(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        if not self.resume and self.checkpoint.exists():
            text = f"The checkpoint of an earlier run in {self.out} will be replaced (--resume would continue it)."
            self.progress.note(text)
        content = load_checkpoint(self.checkpoint) if self.resume else None
        corpus, now = load_corpus(), conditions()
        settings, target = self._settle(content, corpus.digest, now)
        self.head = {"settings": asdict(settings), "digest": corpus.digest, "target": target, "conditions": now}
        with OtherSeeds(settings, self.seeds - 1, target, self.out, resume=self.resume) as others:
            self.progress.phase("looking for residual adds")
            self.training = PairedTraining(settings, make_task(corpus, settings))
            if content is not None:
                self.training.load_state_dict(content["run"])
                self.saved = self.training.step
            inductor = settings.inner_backend == "inductor"
            # In a cache that outlives the process one model may find what the other has to compile.
            with deterministic(), caches(cold=True) if inductor else nullcontext():
                if self.training.step < target:
                    self._train(target, inductor=inductor)
                self.progress.phase("measuring")
                result = collect(self.training, now)
            result["seeds"] += [one["seeds"][0] for one in others.results(self.progress)]
        figures, picture = self.out / RESULT, self.out / PICTURE
        with _written(figures):
            figures.write_text(json.dumps(result, indent=1) + "\n")
        with _written(picture):
            draw(result).savefig(picture)
        return result, self.training.explanation, [figures, picture, self.checkpoint]

    def _settle(self, content: dict[str, Any] | None, digest: str, now: dict[str, Any]) -> tuple[Settings, int]:
        """Return settings and length of the run; compare the checkpoint with the request."""
        if content is None:
            return Settings.choose(self.given), self.steps or STEPS
        problem = f"cannot resume {self.checkpoint}:"
        has, then, old = content["settings"], content["conditions"], content["digest"]
        wrong = [
            f"--{name.replace('_', '-')} is {value!r} here and {has[name]!r} in the checkpoint"
            for name, value in self.given.items()
            if value != has[name]
        ]
        if wrong:
            way_out = "Leave out what differs, or start another run without --resume"
            raise OptionError(f"{problem} {'; '.join(wrong)}. {way_out}")
        step, target = content["run"]["step"], self.steps or content["target"]
        if target < step:
            raise OptionError(
                f"{problem} --steps is {target} and the checkpoint is at step {step} already. Ask for at least {step} steps"
            )
        if old != digest:
            raise OptionError(
                f"{problem} it was trained on the standard library of Python {then['python']} (digest {old[:12]});"
                f" this Python {now['python']} has other files (digest {digest[:12]}). Resume with the same Python"
            )
        for name in now:
            if then.get(name) != now[name]:
                self.progress.note(
                    f"The checkpoint was written with {name} {then.get(name)}, this is {name} {now[name]}:"
                    " the run continues, but perhaps not bit for bit."
                )
        return Settings(**has), target

    def _train(self, target: int, *, inductor: bool) -> None:
        training, progress = self.training, self.progress
        if inductor:
            progress.phase("loading Inductor")
            warm_up()  # the first compilation of a process would be charged with it
        try:
            progress.phase("compiling both models (a minute or so)" if inductor else "tracing both models")
            for trainer in training.trainers.values():  # unshielded, as the first step: nothing new to save yet
                trainer.compile(*training.task.training(training.step))
            self._validate(target)
            training.advance()
            self._save()
            progress.count("training", target, done=training.step)
            while training.step < target:
                self._validate(target)
                with shield():
                    losses = training.advance()
                progress.advance(f"loss {losses['plain']:.3f} plain, {losses['mhc']:.3f} mhc", done=training.step)
                if time.monotonic() - self.saved_at > self.save_every:
                    self._save()
            self._validate(target)
        except KeyboardInterrupt:
            self._save()
            raise
        self._save()

    def _validate(self, target: int) -> None:
        step = self.training.step
        if step % EVERY == 0 and step not in self.training.validation:
            losses = self.training.validate()
            text = f"validation loss {losses['plain']:.4f} plain, {losses['mhc']:.4f} mhc"
            self.progress.log(f"step {step} of {target}: {text}")

    def _save(self) -> None:
        """Write the checkpoint, unless there is one of this step."""
        if self.training.step == self.saved:
            return
        with shield():
            save_checkpoint(self.checkpoint, {**self.head, "run": self.training.state_dict()})
            self.saved, self.saved_at = self.training.step, time.monotonic()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MhcError(f"cannot write {path}: {error.strerror or error}") from error
