"""What a training step costs, all variants in one process and in turn, so that whatever the machine does meanwhile happens to all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from experiment.cost_file import FILE
from experiment.data import Batches
from experiment.plan import write_json
from experiment.training import Subject
from mhc_compile.reporting.conditions import load_average
from mhc_compile.tools.bench.timing import interleave, measure_memory
from mhc_compile.tools.bench.workloads import StepWorkload

if TYPE_CHECKING:
    from pathlib import Path

    from experiment.plan import Plan

__all__ = ["measure"]

#: Rounds that do not count: the first one compiles.
WARM_UP = 3


def _silent(_: str) -> None:
    """Nothing is shown of a round: it takes a second or so."""


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Times `plan.rounds` rounds of one step each (loss, gradients, AdamW), then one more step of each for its memory.

    Returns:
        What is written to `cost.json`: seconds of every round and variant, bytes at the peak over what is there before a step, parameters.
    """
    torch.set_num_threads(1)
    batches = Batches(plan)
    subjects = {name: Subject(plan, name, batches) for name in plan.variants}
    workloads = {
        name: StepWorkload("cpu", subject.loss, subject.model, batches.held_out[0])
        for name, subject in subjects.items()
    }
    before = load_average()
    rounds = interleave(workloads, plan.rounds, WARM_UP, _silent)
    for error in rounds.failures.values():
        raise error
    if rounds.interrupted:
        raise KeyboardInterrupt
    content = {
        "settings": plan.deciding(),
        "seconds": {name: [round(one.total, 6) for one in times] for name, times in rounds.times.items()},
        "peak": {name: measure_memory(workload).peak for name, workload in workloads.items()},
        "parameters": {name: sum(p.numel() for p in s.model.parameters()) for name, s in subjects.items()},
        "load": [before, load_average()],
    }
    write_json(folder / FILE, content)
    return content
