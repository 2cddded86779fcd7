"""The demo from its beginning to its figures: data, models, compilation, training, measurement, files."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import MhcError
from mhc_compile.tools.demo.settings import STEPS, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mhc_compile.results import Explanation
    from mhc_compile.tools.demo.interrupt import Interrupts
    from mhc_compile.tools.demo.progress import Silent
    from mhc_compile.tools.demo.training import Duel

__all__ = ["Interrupted", "Outcome", "Request", "run"]

RESULT, PICTURE, CACHE = "result.json", "loss.png", "inductor-cache"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        given: the settings that were named; the rest come from the defaults, or from the checkpoint that is resumed.
        steps: the length of the run, None for the default or the checkpoint's.
        out: folder of the checkpoint, `result.json` and `loss.png`.
        resume: whether to continue the checkpoint in `out`.
        save_every: seconds between two checkpoints.
    """

    given: Mapping[str, Any]
    steps: int | None
    out: Path
    resume: bool
    save_every: float = 30.0


@dataclass(frozen=True)
class Outcome:
    """A finished run: its figures (see `result`), the site report, and the files that were written."""

    result: dict[str, Any]
    explanation: Explanation
    files: list[Path]


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """Ctrl-C. `step` is how far the checkpoint on disk is, 0 if there is none."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted; the checkpoint is at step {step}")
        self.step = step


class ContradictionError(MhcError):
    """The command line and the checkpoint disagree."""


def run(request: Request, progress: Silent, interrupts: Interrupts) -> Outcome:
    """Runs all of it.

    Raises:
        ContradictionError: the checkpoint has other settings or is further than `steps`.
        MhcError: there is no usable checkpoint, no data, or a file cannot be written.
        Interrupted: Ctrl-C came. If a step was done, a checkpoint is on disk.
    """
    session = _Session(request, progress, interrupts)
    try:
        return session.run()
    except KeyboardInterrupt:
        raise Interrupted(session.rescue()) from None


class _Session:
    def __init__(self, request: Request, progress: Silent, interrupts: Interrupts) -> None:
        self.request = request
        self.progress = progress
        self.interrupts = interrupts
        self.duel: Duel | None = None
        #: Steps in the checkpoint on disk.
        self.saved = 0
        self.saved_at = 0.0
        self.head: dict[str, Any] = {}

    def run(self) -> Outcome:
        import mhc_compile
        from mhc_compile.tools.demo import checkpoint
        from mhc_compile.tools.demo.corpus import load_corpus
        from mhc_compile.tools.demo.determinism import deterministic
        from mhc_compile.tools.demo.inductor import cold_cache
        from mhc_compile.tools.demo.models import build_model
        from mhc_compile.tools.demo.plots import write_png
        from mhc_compile.tools.demo.requirements import hush
        from mhc_compile.tools.demo.result import collect
        from mhc_compile.tools.demo.tasks import make_task
        from mhc_compile.tools.demo.training import Duel, mhc_options

        self.progress.phase("loading transformers and the data")
        hush()
        self._prepare_folder()
        content = checkpoint.load(self._path) if self.request.resume else None
        settings, target = self._settle(content)
        corpus = load_corpus()
        self._compare(content, corpus.digest)
        self.head = {
            "settings": settings.to_dict(),
            "digest": corpus.digest,
            "target": target,
            "conditions": checkpoint.conditions(),
        }
        task = make_task(corpus, settings)
        self.progress.phase("looking for residual adds")
        explanation = mhc_compile.explain(
            build_model(settings, task.classes), task.training(0)[0], options=mhc_options(settings)
        )
        duel = Duel(settings, task)
        if content is not None:
            duel.load_state_dict(content["run"])
            self.saved = duel.step
        self.duel = duel
        cache = cold_cache(self.request.out / CACHE) if settings.inner_backend == "inductor" else nullcontext()
        with deterministic(), cache:
            self._train(duel, target)
            self.progress.phase("measuring")
            result = collect(duel, corpus)
        picture, figures = self.request.out / PICTURE, self.request.out / RESULT
        with _written(figures):
            figures.write_text(json.dumps(result, indent=1) + "\n")
        with _written(picture):
            write_png(result, picture)
        return Outcome(result, explanation, [figures, picture, self._path])

    def _prepare_folder(self) -> None:
        with _written(self.request.out):
            self.request.out.mkdir(parents=True, exist_ok=True)
        if not self.request.resume and self._path.exists():
            self.progress.note(
                f"The checkpoint of an earlier run in {self.request.out} will be replaced (--resume would continue it)."
            )

    @property
    def _path(self) -> Path:
        from mhc_compile.tools.demo import checkpoint

        return self.request.out / checkpoint.NAME

    def _settle(self, content: dict[str, Any] | None) -> tuple[Settings, int]:
        """The settings and the length of the run."""
        if content is None:
            return Settings.choose(self.request.given), self.request.steps or STEPS
        settings = Settings(**content["settings"])
        wrong = settings.contradictions(self.request.given)
        if wrong:
            listed = "; ".join(
                f"--{name} is {given!r} here and {has!r} in the checkpoint" for name, given, has in wrong
            )
            raise ContradictionError(
                f"cannot resume {self._path}: {listed}. Leave out what differs, or start another run without --resume"
            )
        step = content["run"]["step"]
        target = self.request.steps or content["target"]
        if target < step:
            raise ContradictionError(
                f"cannot resume {self._path}: --steps is {target} and the checkpoint is at step {step} already."
                f" Ask for at least {step} steps"
            )
        return settings, target

    def _compare(self, content: dict[str, Any] | None, digest: str) -> None:
        """The data must be the checkpoint's; other versions and thread counts are worth a note."""
        from mhc_compile.tools.demo import checkpoint

        if content is None:
            return
        then, now = content["conditions"], checkpoint.conditions()
        if content["digest"] != digest:
            raise ContradictionError(
                f"cannot resume {self._path}: it was trained on the standard library of Python {then['python']}"
                f" (digest {content['digest'][:12]});"
                f" this Python {now['python']} has other files (digest {digest[:12]}). Resume with the same Python"
            )
        for name in now:
            if then.get(name) != now[name]:
                self.progress.note(
                    f"The checkpoint was written with {name} {then.get(name)}, this is {name} {now[name]}:"
                    " the run continues, but perhaps not bit for bit."
                )

    def _train(self, duel: Duel, target: int) -> None:
        if duel.step >= target:
            return
        from mhc_compile.tools.demo.inductor import warm_up

        inductor = duel.settings.inner_backend == "inductor"
        if inductor:
            self.progress.phase("warming up Inductor on a function of one line")
            warm_up()
        if duel.due:
            self.progress.phase(f"{'compiling' if inductor else 'tracing'} both models for validation")
        self._validate(duel, target)
        self.progress.phase(
            "compiling both models and their backward passes (a minute or so)"
            if inductor
            else "tracing both models for training"
        )
        losses = duel.advance()  # unshielded, for it takes long: until it is done there is nothing new to save
        self._save(duel)
        self.progress.training(duel.step, target)
        self.progress.stepped(duel.step, losses)
        while duel.step < target:
            self._validate(duel, target)
            self.progress.training(duel.step, target)
            with self.interrupts.shield():
                losses = duel.advance()
            self.progress.stepped(duel.step, losses)
            if time.monotonic() - self.saved_at > self.request.save_every:
                self._save(duel)
        self._validate(duel, target)
        if self.saved < duel.step:
            self._save(duel)

    def _validate(self, duel: Duel, target: int) -> None:
        if duel.due:
            losses = duel.validate()
            with self.interrupts.shield():
                duel.record(losses)
            self.progress.validated(duel.step, target, losses)

    def _save(self, duel: Duel) -> None:
        from mhc_compile.tools.demo import checkpoint

        with self.interrupts.shield():
            checkpoint.save(self._path, {**self.head, "run": duel.state_dict()})
            self.saved, self.saved_at = duel.step, time.monotonic()

    def rescue(self) -> int:
        """After Ctrl-C: saves the steps that are not in the checkpoint. Returns the step that is on disk."""
        self.interrupts.pending = False
        if self.duel is not None and self.duel.step > self.saved:
            self._save(self.duel)
        return self.saved


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MhcError(f"cannot write {path}: {error.strerror or error}") from error
