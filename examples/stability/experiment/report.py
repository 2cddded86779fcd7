"""`RESULTS.md`, written from the figures of the summary: also what was not seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from experiment.numbers import SPIKE, SURGE, WINDOW
from experiment.plan import DEFAULT, VARIANTS, ExperimentError, has_streams, read_json, write_json
from experiment.plots import draw_all
from experiment.summary import collect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from experiment.plan import Plan

_ALT = {
    "loss.png": "Training loss of every variant, and its difference to plain",
    "difference.png": "Final validation loss of every variant minus plain's, with intervals",
    "norm.png": "Global gradient norm over training",
    "gain.png": "Amax of the composite H_res, forward and backward",
    "cost.png": "Time and memory of a training step over plain's",
}
#: Columns of the gain.
_GAINS = ("forward", "backward", "error", "distance")


def report(plan: Plan, folder: Path, *, pictures: bool = True) -> list[Path]:
    """Write `summary.json`, the `pictures` and `RESULTS.md`, and return the paths.

    Without files of runs the figures come from the `summary.json` that is there.

    Raises:
        ExperimentError: no run is finished and there is no summary, or they have other settings.
    """
    path = folder / "summary.json"
    summary = collect(plan, folder)
    if summary["runs"]:
        write_json(path, summary)
    elif path.exists():
        planned = summary["settings"]
        summary = read_json(path)
        plan.compare(path, summary["settings"], planned)
    else:
        raise ExperimentError(f"no run of this plan is finished in {folder / 'runs'}. Run without --report first")
    drawn = draw_all(summary, folder) if pictures else []
    text = folder / "RESULTS.md"
    text.write_text(results(summary, [picture.name for picture in drawn]))
    return [path, *drawn, text]


def results(summary: dict[str, Any], pictures: Sequence[str]) -> str:
    """Return the page."""
    parts = [
        "# Results",
        "Made by `run.py`; the guide, `examples/stability/README.md`, has the definitions. Brackets are 95 % confidence intervals.",
        _conditions(summary),
        "## In short",
        "\n".join(f"- {line}" for line in _short(summary)),
    ]
    for rate, entries in summary["rates"].items():
        parts += [f"## Learning rate {rate}, Σ lr {summary['total'][rate]:.2f}", _losses(entries), _stability(entries)]
    if any(summary["pairs"].values()):
        parts += ["## Against mHC", _pairs(summary)]
    if summary["cost"] is not None:
        parts += ["## Cost", _cost(summary["cost"])]
    if pictures:
        parts += ["## Pictures", "\n\n".join(f"![{_ALT[name]}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def _conditions(summary: dict[str, Any]) -> str:
    s = summary["settings"]
    tokens = s["steps"] * s["batch"] * s["length"]
    text = (
        f"{summary['runs']} of {summary['planned']} runs: a decoder of {s['layers']} layers ({2 * s['layers']} residual adds) and C = {s['width']},"
        f" linear layers of initial deviation {s['weights'] / s['width'] ** 0.5:.3g},"
        f" {s['steps']} steps of {s['batch']} × {s['length']} bytes ({tokens:,} in all), {_many(s['seeds'], 'seed')};"
        f" torch {', '.join(summary['conditions']['torch'])}, {s['inner']}."
    )
    if summary["runs"] < summary["planned"]:
        text += " **Not all runs are finished: what follows is of those that are.**"
    return text + " A run this short and small says nothing about large models."


def _short(summary: dict[str, Any]) -> list[str]:
    lines = []
    for rate, entries in summary["rates"].items():
        lines += _verdicts(rate, entries)
    lines.append(_between(summary))
    lines.append(_multiplicity(summary))
    for rate, entries in summary["rates"].items():
        lines += _events(rate, entries)
        lines += _spike_lines(rate, entries)
        lines += _gain_lines(rate, entries)
    starts = [figures["start"] for entries in summary["rates"].values() for figures in entries.values()]
    lines.append(
        f"The start preserves the function: no first loss was further than {max(starts):.1e} from the plain model's."
    )
    if summary["again"]:
        same = [name for name, equal in summary["again"].items() if equal]
        other = [name for name, equal in summary["again"].items() if not equal]
        lines.append(
            f"Trained once more, each as the first run of a process: the same bit for bit: {', '.join(same) or 'none'}."
        )
        lines.append(f"NOT the same: {', '.join(other)}." if other else "")
    return [line for line in lines if line]


def _verdicts(rate: str, entries: dict[str, Any]) -> list[str]:
    seen, unseen = [], []
    for variant, figures in entries.items():
        gap = figures["difference"]
        if gap is None:
            continue
        if _excludes(gap, 0.0):
            side = "lower" if gap["value"] < 0 else "higher"
            agree = sum((value < 0) == (gap["value"] < 0) for value in gap["values"])
            seen.append(
                f"{variant} is {side} by {abs(gap['value']):.3f} {_range(gap, 3)}, {side} in {agree} of {len(gap['values'])} seeds"
            )
        else:
            unseen.append(f"{variant} {gap['value']:+.3f} {_range(gap, 3)}")
    lines = []
    if seen:
        lines.append(f"Final validation loss against plain, lr {rate}: {'; '.join(seen)}.")
    if unseen:
        count = max(len(figures["difference"]["values"]) for figures in entries.values() if figures["difference"])
        lines.append(f"Not distinguishable from plain at {_many(count, 'seed')}, lr {rate}: {'; '.join(unseen)}.")
    return lines


def _between(summary: dict[str, Any]) -> str:
    pairs = [(rate, pair) for rate, some in summary["pairs"].items() for pair in some]
    if not pairs:
        return ""
    apart = [(rate, pair) for rate, pair in pairs if _excludes(pair, 0.0)]
    if not apart:
        return f"No variant's final validation loss is distinguishable from that of {DEFAULT}, of {len(pairs)}."
    named = "; ".join(f"{_better(pair)} (lr {rate})" for rate, pair in apart)
    return f"Distinguishable from {DEFAULT}, {len(apart)} of {len(pairs)} comparisons: {named}. The others are not."


def _better(pair: dict[str, Any]) -> str:
    low, high = (pair["first"], pair["second"]) if pair["value"] < 0 else (pair["second"], pair["first"])
    return f"{low} below {high} by {abs(pair['value']):.3f}"


def _multiplicity(summary: dict[str, Any]) -> str:
    count = sum(
        figures["difference"] is not None for entries in summary["rates"].values() for figures in entries.values()
    )
    count += sum(map(len, summary["pairs"].values()))
    if count < 2:
        return ""
    return (
        f"These are {count} comparisons with 95 % intervals that are not corrected for their number:"
        f" without any true difference about {0.05 * count:.1f} of them would be called distinguishable."
    )


def _events(rate: str, entries: dict[str, Any]) -> list[str]:
    count = sum(figures["diverged"]["count"] for figures in entries.values())
    hits = {variant: figures["diverged"]["hits"] for variant, figures in entries.items() if figures["diverged"]["hits"]}
    lines = []
    if hits:
        named = ", ".join(f"{variant} {n} of {entries[variant]['diverged']['count']}" for variant, n in hits.items())
        lines.append(f"Diverged, lr {rate}: {named}; no run of the others.")
    else:
        gone = min((figures["diverged"] for figures in entries.values()), key=lambda gone: gone["count"])
        lines.append(
            f"No divergence, lr {rate}: none of {count} runs. {_many(gone['count'], 'run')} of a variant without one"
            f" leave{'s' * (gone['count'] == 1)} room for a share of up to {gone['high']:.0%}."
        )
    for name in ("surges", "spikes"):
        some = {
            variant: sum(figures[name]["values"])
            for variant, figures in entries.items()
            if sum(figures[name]["values"])
        }
        what = {"surges": "Surges of the loss", "spikes": "Spikes of the gradient norm"}[name]
        if some:
            lines.append(
                f"{what}, lr {rate}, all seeds together: {', '.join(f'{v} {n}' for v, n in some.items())}; no other variant has one."
            )
        else:
            lines.append(f"{what}, lr {rate}: none in any run.")
    return lines


def _gain_lines(rate: str, entries: dict[str, Any]) -> list[str]:
    known = {variant: figures["largest"] for variant, figures in entries.items() if has_streams(variant)}
    parts = [f"{variant} {_number(forward)} and {_number(backward)}" for variant, (forward, backward) in known.items()]
    if not parts:
        return []
    return [f"Largest Amax of any run and measurement, forward and backward, lr {rate}: {'; '.join(parts)}."]


def _spike_lines(rate: str, entries: dict[str, Any]) -> list[str]:
    more = {v: f["more_spikes"] for v, f in entries.items() if f["more_spikes"] is not None}
    apart = {variant: gap for variant, gap in more.items() if _excludes(gap, 0.0)}
    if not more:
        return []
    if not apart:
        return [f"No variant's number of spikes is distinguishable from plain's, lr {rate}."]
    named = "; ".join(
        f"{variant} {abs(gap['value']):.1f} {'more' if gap['value'] > 0 else 'fewer'} a run {_range(gap, 1)}"
        for variant, gap in apart.items()
    )
    others = [variant for variant in more if variant not in apart]
    rest = f" Not distinguishable from plain's: {', '.join(others)}." if others else ""
    return [f"Spikes against plain, lr {rate}: {named}.{rest}"]


def _losses(entries: dict[str, Any]) -> str:
    rows = [["", "final validation loss", "minus plain, seed by seed", "training loss, last 20 steps", "seeds"]]
    for variant, figures in entries.items():
        value, gap = figures["validation"], figures["difference"]
        last = figures["curve"][-1] if figures["curve"] else None
        rows.append([
            _name(variant),
            f"{value['value']:.4f} {_range(value, 4)}" if value else "no run got to the end",
            f"{gap['value']:+.4f} {_range(gap, 4)}" if gap else "",
            f"{last[1]:.4f} {_ends(last[2], last[3], 4)}" if last else "",
            str(len(value["values"]) if value else 0),
        ])  # fmt: skip
    return _table(rows)


def _stability(entries: dict[str, Any]) -> str:
    rows = [
        [
            "",
            f"spikes a run (norm > {SPIKE:g} × median of {WINDOW})",
            f"surges a run (loss up {SURGE:g})",
            "diverged",
            "Amax forward",
            "Amax backward",
            "error of sums",
            "streams' distance",
        ]
    ]
    for variant, figures in entries.items():
        spikes, surges, gone = figures["spikes"], figures["surges"], figures["diverged"]
        gains = [_end_of(figures["gain"][name], name) if has_streams(variant) else "" for name in _GAINS]
        rows.append([
            _name(variant),
            f"{spikes['value']:.1f} {_range(spikes, 1, floor=0.0)}",
            f"{surges['value']:.1f} {_range(surges, 1, floor=0.0)}",
            f"{gone['hits']} of {gone['count']} [{gone['low']:.0%}, {gone['high']:.0%}]",
            *gains,
        ])  # fmt: skip
    return _table(rows)


def _end_of(points: Sequence[Sequence[Any]], name: str) -> str:
    """Return the last measurement; errors of sums are small and need an exponent."""
    if not points:
        return ""
    _, value, low, high = points[-1]
    show = "{:.1e}".format if name == "error" else _number
    ends = "[one seed]" if low is None or high is None else f"[{show(max(low, 0.0))}, {show(high)}]"
    return f"{show(value)} {ends}"


def _pairs(summary: dict[str, Any]) -> str:
    rows = [["final validation loss", *summary["pairs"]]]
    cells: dict[str, dict[str, str]] = {}
    for rate, pairs in summary["pairs"].items():
        for pair in pairs:
            name = f"{pair['first']} − {pair['second']}"
            mark = " *" if _excludes(pair, 0.0) else ""
            cells.setdefault(name, {})[rate] = f"{pair['value']:+.4f} {_range(pair, 4)}{mark}"
    rows += [[name, *(by_rate.get(rate, "") for rate in summary["pairs"])] for name, by_rate in cells.items()]
    return _table(rows) + "\n\nSeed by seed; a star: the interval leaves 0 out."


def _cost(cost: dict[str, Any]) -> str:
    rows = [["", "ms a step", "over plain, in the same round", "parameters", "peak memory of a step, MB", "over plain"]]
    for variant, figures in cost["variants"].items():
        time, ratio = figures["milliseconds"], figures.get("ratio")
        rows.append([
            _name(variant),
            f"{time['value']:.1f} {_range(time, 1)}",
            f"{ratio['value']:.3f} {_range(ratio, 3)}" if ratio else "",
            f"{figures['parameters']:,}",
            f"{figures['peak'] / 1e6:.1f}",
            f"{figures['peak_ratio']:.2f}" if ratio else "",
        ])  # fmt: skip
    before, after = cost["load"]
    return (
        f"{_table(rows)}\n\nMedians over {cost['rounds']} rounds on one thread; load of the machine {before:.1f} before and"
        f" {after:.1f} after. The model is narrow and its batch small, which makes hyper-connections dear: `mhc bench`"
        " measures at larger widths."
    )


def _name(variant: str) -> str:
    return VARIANTS[variant].label


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _excludes(interval: dict[str, Any], value: float) -> bool:
    if interval["low"] is None or interval["high"] is None:
        return False
    return not interval["low"] <= value <= interval["high"]


def _range(interval: dict[str, Any], digits: int, floor: float = -math.inf) -> str:
    low = interval["low"]
    return _ends(low if low is None else max(low, floor), interval["high"], digits)


def _ends(low: float | None, high: float | None, digits: int) -> str:
    if low is None or high is None:
        return "[one seed]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float) -> str:
    if abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) < 1e5 else f"{value:.1e}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
