"""Every figure of a run, as plain data: what `result.json` holds and what `summary` and `plots` show.

model, steps, unit   what was trained, for how many steps, and what its sequence is made of ("byte" or "patch")
settings             every option that decides the numbers
data                 files and bytes of both splits, and a digest of all of it
conditions           versions, threads, and how OpenMP's threads wait for each other
sites                residual adds that are hyper-connections
chance               loss of a uniform guess
plain, mhc           one entry per side, with what begins with a dot here
.parameters          how many
.loss                training loss of every step, in nats per target
.validation          [step, loss] pairs; the last is the final one
.final               mean training loss of the last 20 steps
.step_seconds        median seconds of a step, without those that compiled
.tokens_per_second   from that median
.compile_seconds     first step less a usual one (mhc: and attaching), one entry for every process of the run
first_step           training loss of both before any update, and the difference
ratio                tokens per second, mhc / plain
gain                 Amax of the composite H_res over depth, forward and backward
streams_distance     rms deviation of the streams from their mean, relative to it, at the entry of each site
"""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING, Any

import mhc_compile
from mhc_compile.tools.demo import checkpoint

if TYPE_CHECKING:
    from mhc_compile.tools.demo.corpus import Corpus, Split
    from mhc_compile.tools.demo.side import Side
    from mhc_compile.tools.demo.training import Duel

__all__ = ["SMOOTHED", "collect"]

#: Steps in a smoothed training loss.
SMOOTHED = 20


def collect(duel: Duel, corpus: Corpus) -> dict[str, Any]:
    """The figures of a run that has trained at least one step.

    Validates it at its end, if that was not done already, and runs it once more for the gain.
    """
    final = duel.final()
    tokens = duel.task.tokens
    plain = _side(duel.plain, duel.step, final.plain, tokens)
    mhc = _side(duel.mhc, duel.step, final.mhc, tokens)
    sites = duel.stability().sites
    return {
        "model": type(duel.plain.model).__name__,
        "steps": duel.step,
        "unit": duel.task.unit,
        "settings": duel.settings.to_dict(),
        "data": {"train": _split(corpus.train), "validation": _split(corpus.validation), "digest": corpus.digest},
        "conditions": {
            **checkpoint.conditions(),
            "mhc_compile": mhc_compile.__version__,
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
        },
        "sites": len(mhc_compile.connections(duel.mhc.model)),
        "chance": duel.task.chance,
        "plain": plain,
        "mhc": mhc,
        "first_step": {
            "plain": plain["loss"][0],
            "mhc": mhc["loss"][0],
            "difference": mhc["loss"][0] - plain["loss"][0],
        },
        "ratio": mhc["tokens_per_second"] / plain["tokens_per_second"],
        "gain": {
            "forward": max(site.composite_forward for site in sites),
            "backward": max(site.composite_backward for site in sites),
        },
        "streams_distance": [site.entering.distance for site in sites],
    }


def _side(side: Side, step: int, final: float, tokens: int) -> dict[str, Any]:
    points = [list(point) for point in side.validation]
    if not points or points[-1][0] != step:
        points.append([step, final])
    return {
        "parameters": sum(parameter.numel() for parameter in side.model.parameters()),
        "loss": side.losses,
        "validation": points,
        "final": statistics.fmean(side.losses[-SMOOTHED:]),
        "step_seconds": side.step_seconds,
        "tokens_per_second": tokens / side.step_seconds,
        "compile_seconds": side.compile_seconds,
    }


def _split(split: Split) -> dict[str, int]:
    return {"files": len(split.files), "bytes": len(split.data)}
