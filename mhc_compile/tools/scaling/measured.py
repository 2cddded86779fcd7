"""The cost model of `mhc explain` and `mhc scaling` against steps that `mhc bench` measures.

    python -m mhc_compile.tools.scaling.measured FILE.json

The model's two constants are measured on the same machine and threads: arithmetic as `torch.mm` of
a feed-forward branch, bandwidth as a copy that no cache holds. Overheads are shares of forward and
backward; the cost model does not know the optimizer.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.benchmark import Timer

from mhc_compile.inspection.explain.explain import explain
from mhc_compile.inspection.roofline import Machine
from mhc_compile.reporting.progress import Silent
from mhc_compile.tools.bench.candidates import PLAIN
from mhc_compile.tools.bench.measure import run
from mhc_compile.tools.bench.results import paired_ratio
from mhc_compile.tools.bench.sites import Shape
from mhc_compile.tools.bench.workloads import PlainModel, batch
from mhc_compile.tools.scaling.estimate import kept_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

#: C and vocabulary.
_SIZES = ((256, 50257), (768, 50257))
#: Elements of the buffer that is copied: 256 MiB in float32, more than any cache.
_LARGE = 1 << 26


def this_machine(width: int, tokens: int) -> Machine:
    """Measure this machine in float32, with torch's current threads."""
    left, right, out = (torch.randn(*size) for size in ((tokens, width), (width, 4 * width), (tokens, 4 * width)))
    source, target = torch.zeros(_LARGE), torch.zeros(_LARGE)
    products = 2 * tokens * width * 4 * width / _median(lambda: torch.mm(left, right, out=out))
    bandwidth = 2 * 4 * _LARGE / _median(lambda: target.copy_(source))
    return Machine("this machine", "float32", 4, products, bandwidth, "measured: torch.mm and a copy")


def _median(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


def compare(shape: Shape, *, rounds: int = 15, cold: bool = True) -> dict[str, Any]:
    """Predict and measure the model of one shape on the CPU, in float32.

    Returns:
        `width`; `flops` and `bandwidth` of the machine; `plain_predicted` and `plain_measured`,
        seconds; `floor`, `lowered` (predicted) and `measured` (median and quartiles), overheads;
        `kept_predicted` and `kept_measured`, bytes beyond the plain model; `conditions`.

    Raises:
        RuntimeError: a model could not be measured.
    """
    machine = this_machine(shape.width, shape.tokens)
    explanation = explain(PlainModel(shape), *batch(shape))
    assert explanation.plain is not None
    result = run(shape, only=(PLAIN, "ours"), kinds=("step",), rounds=rounds, cold=cold, progress=Silent())
    base, ours = result.benchmarks[0].rows
    for row in (base, ours):
        if row.status != "ok" or row.saved_bytes is None:
            raise RuntimeError(f"{row.name}: {row.status}: {row.message}")
    passes = [
        [sum(pair) for pair in zip(row.samples["forward"], row.samples["backward"], strict=True)]
        for row in (base, ours)
    ]
    ratio = paired_ratio(passes[1], passes[0])
    seconds = machine.seconds(explanation.plain)
    per_token = kept_bytes(shape.width, shape.real.itemsize, explanation.options, shape.sites, "cheap")
    return {
        "width": shape.width,
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
        "plain_predicted": 3 * seconds,  # a backward is taken as two forwards
        "plain_measured": statistics.median(passes[0]),
        "floor": machine.seconds(explanation.floor) / seconds,
        "lowered": machine.seconds(explanation.added) / seconds,
        "measured": {name: value - 1 for name, value in asdict(ratio).items()},
        "kept_predicted": per_token * shape.tokens,
        "kept_measured": (ours.saved_bytes or 0) - (base.saved_bytes or 0),
        "conditions": result.conditions,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m mhc_compile.tools.scaling.measured FILE.json")
    found = [compare(Shape(width=width, vocabulary=vocabulary)) for width, vocabulary in _SIZES]
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
