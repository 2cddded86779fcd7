"""One process, one variant: compiles it once, trains what is not finished yet, says on stdout how far it is."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch

from experiment.data import Batches
from experiment.plan import ExperimentError, Run, write_json
from experiment.training import Subject
from mhc_compile.tools.demo.train import deterministic

if TYPE_CHECKING:
    from pathlib import Path

    from experiment.plan import Plan

__all__ = ["again", "work"]


def _say(kind: str, **what: Any) -> None:
    print(json.dumps({"kind": kind, **what}), flush=True)


def work(plan: Plan, variant: str, folder: Path) -> None:
    """Trains every run of `variant` that has no file in `folder` yet, and writes its file when it is done."""
    torch.set_num_threads(1)
    missing = [run for run in plan.runs() if run.variant == variant and plan.finished(folder, run) is None]
    if not missing:
        return
    _say("preparing", variant=variant)
    with deterministic():
        subject = Subject(plan, variant, Batches(plan))
        for run in missing:
            _say("begin", run=run.name)
            content = subject.train(run, lambda step, loss: _say("step", step=step, loss=loss))
            write_json(folder / "runs" / f"{run.name}.json", content)
            _say("end", run=run.name)


def again(plan: Plan, run: Run, folder: Path) -> bool:
    """Trains a finished run once more, as the first of this process. Returns whether every loss and weight is the same, bit for bit.

    Raises:
        ExperimentError: it is not finished.
    """
    torch.set_num_threads(1)
    before = plan.finished(folder, run)
    if before is None:
        raise ExperimentError(f"{folder / 'runs' / run.name}.json is not there: nothing to compare with")
    with deterministic():
        content = Subject(plan, run.variant, Batches(plan)).train(run)
    if content["data"] != before["data"]:
        print(
            "the standard library here is another one than the file's: its losses cannot be the same", file=sys.stderr
        )
    return bool(content["digest"] == before["digest"])
