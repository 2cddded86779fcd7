"""Every figure of the report, with its interval, from the files of the runs.

    runs, planned          number of finished runs, and of all
    settings, conditions   of the plan, and of the machine
    rates[r][v]            for each learning rate and variant, with what begins with a dot here
    .validation            loss at the end: mean over seeds, t-interval, and the value of every seed
    .difference            the same of `variant − plain`, seed by seed
    .start                 largest distance of a first loss from the plain model's
    .spikes, .surges       number a run: mean over seeds, t-interval, values
    .diverged              number of runs, of how many, Clopper-Pearson interval of the share
    .more_spikes           number of spikes above that of plain's run of the same seed
    .largest               the largest Amax of any run and measurement, forward and backward
    .gain                  [step, mean, low, high] of Amax forward and backward (geometric means),
                           distance, largest error of a sum, at every measurement
    .curve, .gap, .norm    [step, mean, low, high] of the smoothed training loss, its difference to
                           plain, and log10 of the gradient norm
    total[r]               sum of the learning rates of a run
    pairs[r]               final validation loss of a variant minus that of mHC, seed by seed
    again                  runs that were trained again, and whether they were the same bit for bit
    cost[v]                milliseconds a step, ratio to plain in the same round, parameters, memory

An interval is {"value", "low", "high"}; an unknown end is null.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from experiment.numbers import (
    TAIL,
    Interval,
    diverged,
    mean_interval,
    median_interval,
    proportion_interval,
    spikes,
    surges,
    trailing,
)
from experiment.plan import AGAIN, DEFAULT, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from experiment.plan import Plan

#: One in so many trailing means is kept, so that they share no losses; of gradient norms twice as
#: many.
EVERY = 20


def entry(interval: Interval, **more: Any) -> dict[str, Any]:
    ends = {name: _plain(getattr(interval, name)) for name in ("value", "low", "high")}
    return {**ends, **more}


def collect(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return every figure of the finished runs.

    Raises:
        ExperimentError: a run was made with other settings.
    """
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for run in plan.runs():
        content = plan.finished(folder, run)
        if content is not None:
            for name in ("loss", "norm"):
                content[name] = [math.nan if value is None else value for value in content[name]]
            found[run.variant, run.rate, run.seed] = content
    return {
        "runs": len(found),
        "planned": len(list(plan.runs())),
        "settings": {**plan.deciding(), "seeds": plan.seeds, "variants": list(plan.variants)},
        "conditions": {
            "torch": sorted({content["torch"] for content in found.values()}),
            "data": sorted({content["data"] for content in found.values()}),
            "seconds": round(sum(content["seconds"] for content in found.values())),
        },
        "rates": {f"{rate:g}": _rate(plan, rate, found) for rate in plan.rates},
        "total": {f"{rate:g}": _plain(plan.total_rate(rate)) for rate in plan.rates},
        "pairs": {f"{rate:g}": _pairs(plan, rate, found) for rate in plan.rates},
        "cost": _cost(plan, folder),
        "again": read_json(folder / AGAIN) if (folder / AGAIN).exists() else {},
    }


def _final(content: dict[str, Any] | None, plan: Plan) -> float | None:
    """Return the validation loss at the end, None for a run that did not get there."""
    if content is None or not content["validation"] or content["validation"][-1][0] != plan.steps:
        return None
    value = content["validation"][-1][1]
    return None if value is None else float(value)


def _rate(plan: Plan, rate: float, found: dict[tuple[str, float, int], dict[str, Any]]) -> dict[str, Any]:
    result = {}
    for variant in plan.variants:
        runs = {seed: found[variant, rate, seed] for seed in range(plan.seeds) if (variant, rate, seed) in found}
        if not runs:
            continue
        plain = {seed: found["plain", rate, seed] for seed in runs if ("plain", rate, seed) in found}
        ends = {seed: _final(content, plan) for seed, content in runs.items()}
        reached = {seed: value for seed, value in ends.items() if value is not None}
        gaps = {seed: _minus(value, _final(plain.get(seed), plan)) for seed, value in reached.items()}
        both = {seed: value for seed, value in gaps.items() if value is not None}
        count = {seed: len(spikes(content["norm"])) for seed, content in runs.items()}
        more = {seed: count[seed] - len(spikes(content["norm"])) for seed, content in plain.items()}
        hits = sum(diverged(content["loss"], content["norm"]) for content in runs.values())
        result[variant] = {
            "validation": _mean(reached),
            "difference": None if variant == "plain" else _mean(both),
            "start": max(content["start"] for content in runs.values()),
            "spikes": _mean(count),
            "more_spikes": None if variant == "plain" else _mean(more),
            "surges": _mean({seed: surges(content["loss"]) for seed, content in runs.items()}),
            "diverged": entry(proportion_interval(hits, len(runs)), hits=hits, count=len(runs)),
            "gain": _gains(list(runs.values())),
            "largest": [
                max((p[i] for run in runs.values() for p in run["gain"] if p[i] is not None), default=1.0)
                for i in (1, 2)
            ],
            "curve": _curve([trailing(content["loss"]) for content in runs.values()], TAIL),
            "gap": None if variant == "plain" else _curve([_gap(runs[seed], plain[seed]) for seed in plain], TAIL),
            "norm": _curve([list(map(_log, content["norm"])) for content in runs.values()], 1, EVERY // 2),
        }
    return result


def _gap(run: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    return [a - b for a, b in zip(trailing(run["loss"]), trailing(plain["loss"]), strict=False)]


def _pairs(plan: Plan, rate: float, found: dict[tuple[str, float, int], dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for first, second in ((variant, DEFAULT) for variant in plan.variants if variant not in ("plain", DEFAULT)):
        gaps = {
            seed: _minus(_final(found.get((first, rate, seed)), plan), _final(found.get((second, rate, seed)), plan))
            for seed in range(plan.seeds)
        }
        known = _mean({seed: value for seed, value in gaps.items() if value is not None})
        if known is not None:
            result.append({"first": first, "second": second, **known})
    return result


def _cost(plan: Plan, folder: Path) -> dict[str, Any] | None:
    content = plan.cost(folder)
    if content is None:
        return None
    result = {}
    for variant in plan.variants:
        seconds = content["seconds"][variant]
        result[variant] = {
            "milliseconds": entry(median_interval([1000 * value for value in seconds])),
            "parameters": content["parameters"][variant],
            "peak": content["peak"][variant],
        }
        if "plain" in plan.variants:
            ratios = [value / base for value, base in zip(seconds, content["seconds"]["plain"], strict=True)]
            result[variant]["ratio"] = entry(median_interval(ratios))
            result[variant]["peak_ratio"] = content["peak"][variant] / content["peak"]["plain"]
    return {"rounds": len(content["seconds"][plan.variants[0]]), "load": content["load"], "variants": result}


def _gains(runs: list[dict[str, Any]]) -> dict[str, list[list[Any]]]:
    result = {}
    for place, name in enumerate(("forward", "backward", "distance", "error"), 1):
        values: dict[int, list[float]] = {}
        for run in runs:
            for point in run["gain"]:
                if point[place] is not None:
                    values.setdefault(point[0], []).append(point[place])
        # Gains are products over depth: their logarithms are averaged.
        mean = _geometric if name in ("forward", "backward") else _point
        result[name] = [mean(step, values[step]) for step in sorted(values)]
    return result


def _geometric(step: int, values: Sequence[float]) -> list[Any]:
    interval = mean_interval([math.log(value) for value in values])
    low, high = (math.exp(end) if abs(end) < 700 else math.inf for end in (interval.low, interval.high))
    return [step, _plain(math.exp(interval.value)), _plain(low), _plain(high)]


def _curve(curves: Sequence[Sequence[float]], first: int, every: int = EVERY) -> list[list[Any]]:
    """Return the mean of the curves at some steps and the last; an ended run leaves it."""
    longest = max((len(curve) for curve in curves), default=0)
    chosen = [i for i in range(longest) if i % every == 0 or i == longest - 1]
    at: Callable[[int], list[float]] = lambda i: [c[i] for c in curves if i < len(c) and math.isfinite(c[i])]  # noqa: E731
    return [_point(i + first, at(i)) for i in chosen if at(i)]


def _point(step: int, values: Sequence[float]) -> list[Any]:
    interval = mean_interval(values)
    return [step, _plain(interval.value), _plain(interval.low), _plain(interval.high)]


def _mean(values: dict[int, float]) -> dict[str, Any] | None:
    if not values:
        return None
    return entry(mean_interval(list(values.values())), values=list(values.values()), seeds=list(values))


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _plain(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
