"""All runs, in processes of one thread each: one variant a process, so that it is compiled once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.plan import COST, VARIANTS, ExperimentError, Run, write_json

if TYPE_CHECKING:
    from experiment.plan import Plan
    from mhc_compile.reporting.progress import Silent

#: Rounds of the measurement of cost that do not count: the first one compiles.
WARM_UP = 3


def start(plan: Plan, folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `run.py` with one thread, which does not spin while it waits."""
    script = Path(__file__).parents[1] / "run.py"
    command = [sys.executable, str(script), "--out", str(folder), "--plan", plan.to_json(), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, text=True, env=environment, **options)


def train_all(plan: Plan, folder: Path, count: int, progress: Silent) -> None:
    """Train what is not finished. Ctrl-C ends the processes and keeps the finished runs.

    Raises:
        ExperimentError: a process failed, or a finished run has other settings.
    """
    runs = list(plan.runs())
    missing = [run for run in runs if plan.finished(folder, run) is None]
    if not missing:
        return
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[str]] = []
    finished = len(runs) - len(missing)

    def train(variant: str) -> None:
        nonlocal finished
        log = folder / "runs" / f"{variant}.log"
        with log.open("w") as errors:
            process = start(plan, folder, "--worker", variant, stdout=subprocess.PIPE, stderr=errors)
        running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            event = json.loads(line)
            finished += event["end"]
            if event["end"]:
                progress.note(f"{finished} of {len(runs)} runs: {event['run']}, last loss {event['loss']:.4f}")
            progress.advance(f"{event['run']}, loss {event['loss']:.3f}", done=finished)
        if process.wait():
            lines = log.read_text().strip().splitlines() or ["it left no message"]
            raise ExperimentError(
                f"the process of {variant} ended with {process.returncode}: {lines[-1]}\nAll of it: {log}"
            )
        log.unlink()

    progress.count("runs", len(runs), done=finished)
    pool = ThreadPoolExecutor(count)
    try:
        for future in as_completed(pool.submit(train, v) for v in VARIANTS if any(run.variant == v for run in missing)):
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()


def train_variant(plan: Plan, variant: str, folder: Path) -> None:
    """Train the runs of `variant` without a file; print progress as lines of JSON."""
    import torch

    from experiment.training import Subject
    from mhc_compile.tools.demo.train import deterministic

    torch.set_num_threads(1)
    with deterministic():
        subject = Subject(plan, variant)
        plan.compare_data(folder, subject.batches.corpus.digest)
        for run in plan.runs():
            if run.variant != variant or plan.finished(folder, run) is not None:
                continue
            name = run.name

            def say(loss: float, *, end: bool = False, name: str = name) -> None:
                print(json.dumps({"run": name, "loss": loss, "end": end}), flush=True)

            part = folder / "runs" / f"{name}.part"
            write_json(folder / "runs" / f"{name}.json", content := subject.train(run, say, part=part))
            part.unlink(missing_ok=True)
            say(content["loss"][-1] or float("nan"), end=True)


def train_again(plan: Plan, run: Run, folder: Path) -> bool:
    """Train a finished run again, first in this process. Return whether all bits are the same.

    Raises:
        ExperimentError: the run is not finished.
    """
    import torch

    from experiment.training import Subject
    from mhc_compile.tools.demo.train import deterministic

    before = plan.finished(folder, run)
    if before is None:
        raise ExperimentError(f"{folder / 'runs' / run.name}.json is not there: nothing to compare with")
    torch.set_num_threads(1)
    with deterministic():
        content = Subject(plan, run.variant).train(run)
    if content["data"] != before["data"]:
        print("the standard library here is another one: its losses cannot be the same", file=sys.stderr)
    return bool(content["digest"] == before["digest"])


def measure_cost(plan: Plan, folder: Path) -> None:
    """Time a step (loss, gradients, AdamW) of every variant in turn, then measure its memory.

    Write `cost.json`: seconds by variant and round, bytes at the peak of a step, parameters.
    """
    import torch

    from experiment.training import Batches, Subject
    from mhc_compile.reporting.conditions import load_average
    from mhc_compile.tools.bench.timing import interleave, measure_memory
    from mhc_compile.tools.bench.workloads import StepWorkload

    torch.set_num_threads(1)
    batches = Batches(plan)
    subjects = {name: Subject(plan, name, batches) for name in plan.variants}
    workloads = {
        name: StepWorkload("cpu", subject.loss, subject.model, batches.held_out[0])
        for name, subject in subjects.items()
    }
    before = load_average()
    rounds = interleave(workloads, plan.rounds, WARM_UP, lambda _: None)
    for error in rounds.failures.values():
        raise error
    if rounds.interrupted:
        raise KeyboardInterrupt
    content = {
        "settings": plan.timed(),
        "seconds": {name: [round(one.total, 6) for one in times] for name, times in rounds.times.items()},
        "peak": {name: measure_memory(workload).peak for name, workload in workloads.items()},
        "parameters": {name: sum(p.numel() for p in s.model.parameters()) for name, s in subjects.items()},
        "load": [before, load_average()],
    }
    write_json(folder / COST, content)
