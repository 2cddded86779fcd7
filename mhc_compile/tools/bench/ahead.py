"""Candidates compiled ahead of the measurement, each in a process of its own, several at a time.

The processes fill the caches of Inductor and Triton on disk, from which the measuring process then
loads: the compilation of all candidates takes as long as that of a few. A process is

    python -m mhc_compile.tools.bench.ahead '{"candidate": "ours", "kinds": ["site"], "shape": {}}'

and writes `{"site": [seconds, [kernels, externs, bytes]]}` as its last line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING

import torch

from mhc_compile._torch.benchmarking import warm_up
from mhc_compile.reporting.conditions import available_cores
from mhc_compile.tools.bench.builds import build
from mhc_compile.tools.bench.candidates import CANDIDATES, Candidate
from mhc_compile.tools.bench.results import Counters
from mhc_compile.tools.bench.sites import Shape
from mhc_compile.tools.bench.timing import FirstRun, first_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.reporting.progress import Silent

log = logging.getLogger(__name__)

#: First runs by kind, shape and name of the candidate; None where there was no time for it.
FirstRuns = dict[tuple[str, Shape, str], FirstRun | None]


def compile_ahead(
    candidates: Sequence[Candidate],
    kinds: Sequence[str],
    shapes: Sequence[Shape],
    *,
    processes: int,
    end: float,
    progress: Silent,
) -> FirstRuns:
    """Compile everything in at most `processes` processes until `end`, a time of `time.monotonic`.

    What fails in its process has no entry: the measuring process compiles it, or reports the error.
    """
    jobs = [(shape, one) for shape in shapes for one in candidates if not one.missing(shape)]
    processes = max(1, min(processes, len(jobs), *(_room(shape) for shape in shapes)))
    threads = max(1, available_cores() // processes)  # in which Inductor compiles Triton's kernels
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    progress.count(f"compiling in {processes} processes", len(jobs))

    def compile_one(job: tuple[Shape, Candidate]) -> dict[str, FirstRun] | None:
        """Return the first runs by kind; None where the time was over."""
        shape, candidate = job
        mine = [kind for kind in kinds if kind in candidate.kinds]
        argument = json.dumps({"candidate": candidate.name, "kinds": mine, "shape": asdict(shape)})
        left = end - time.monotonic()
        try:
            if left <= 0:
                return None
            done = subprocess.run(  # noqa: S603 - this module
                [sys.executable, "-m", __name__, argument],
                env=environment, capture_output=True, text=True, check=True,
                timeout=None if math.isinf(left) else left,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return None
        except (subprocess.CalledProcessError, IndexError, ValueError) as error:
            text = str(getattr(error, "stderr", error)).strip()
            log.debug("%s: %s", argument, text)
            why = text.splitlines()[-1] if text else error
            progress.note(
                f"{candidate.name}, C = {shape.width}, T = {shape.tokens}: failed in its process, is compiled again here: {why}"
            )
            return {}
        return {kind: FirstRun(seconds, counts and Counters(*counts)) for kind, (seconds, counts) in found.items()}

    firsts: FirstRuns = {}
    with ThreadPoolExecutor(processes) as pool:
        for (shape, candidate), found in zip(jobs, pool.map(compile_one, jobs), strict=True):
            progress.advance(candidate.name)
            new = dict.fromkeys(kinds) if found is None else found
            firsts |= {(kind, shape, candidate.name): first for kind, first in new.items()}
    return firsts


def _room(shape: Shape) -> int:
    """Return how many steps of this shape fit into the free memory of the device, by estimate.

    Bytes: weights, gradients and AdamW in bfloat16, some 24 tensors [T, C] a site with the streams,
    logits in both dtypes, and the CUDA context.
    """
    if shape.device != "cuda":
        return available_cores()
    parameters = 12 * shape.width**2 * shape.layers + shape.width * shape.vocabulary
    activations = 24 * shape.sites * shape.tokens * shape.width + 5 * shape.tokens * shape.vocabulary
    needed = (4 * parameters + activations) * shape.real.itemsize + 2**30
    return int(torch.cuda.mem_get_info()[0] // needed)


def main(argument: str) -> None:
    """Compile one candidate, and print the seconds and counts of its first runs."""
    job = json.loads(argument)
    shape = Shape(**job["shape"])
    candidate = next(one for one in CANDIDATES if one.name == job["candidate"])
    warm_up(shape.device)
    found = {}
    for kind in job["kinds"]:
        _, workload = build(kind, shape, candidate, repeats=1)
        seconds, counters = first_run(workload, cold=None)
        found[kind] = seconds, counters and astuple(counters)
    print(json.dumps(found))  # noqa: T201 - the result


if __name__ == "__main__":
    main(sys.argv[1])
