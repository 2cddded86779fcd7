"""Results as rich tables and as a PNG."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mhc_compile.tools.bench.candidates import LIMIT, PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from mhc_compile.tools.bench.results import Benchmark, Checks, Counters, Result, Row, TargetResult

#: Width in columns from which on times and counts are one table.
WIDE = 130
#: Kernels of a candidate that are shown by name, and the length of the names; JSON has all.
_KERNELS, _NAME = 8, 48
_TITLES = {
    "site": "One site: the write of a site and the read of the next",
    "step": "One training step: forward, backward, AdamW",
    "forward": "One forward pass without gradients",
}
_LEGENDS = {
    "site": (
        "ms: median (quartiles of both together). × plain: of the same rounds. of limit: limit / this. kernels: that"
        " Inductor generated + calls of other operators. MB: read and written, by Inductor's count; the limit's by"
        " hand. saved, peak, compile: as below."
    ),
    "cuda": (
        "forward, backward, total: between events on the stream. host: ms to enqueue a run; where it is not below the"
        " total, the host is what is measured. peak × plain: of peak MB. limit: the bytes at the bandwidth of a copy."
        " compile: in a process of its own, several at once."
    ),
    "step": (
        "+ ms/site, kernels/site and MB/site: (this − plain) / sites. saved: alive between forward and backward; saved"
        " and peak are over the memory in use before the step. compile: the first forward and backward, from empty"
        " caches."
    ),
    "forward": (
        "total: median (quartiles). × plain: of the same rounds. + ms/site, kernels/site and MB/site: (this − plain) /"
        " sites. saved: the outputs; saved and peak are over the memory in use before. compile: the first forward, from"
        " empty caches."
    ),
    "target": (
        "total: median (quartiles). × plain: of the same rounds. per site: (this − plain) / sites. compile: the first"
        " forward and backward, from empty caches unless --quick."
    ),
}
_COLOURS = {"missing": "yellow", "failed": "red"}


def view(result: Result, width: int) -> RenderableType:
    """Return the tables of a run for a terminal of `width` columns."""
    parts: list[RenderableType] = []
    for benchmark in result.benchmarks:
        title = f"{_TITLES[benchmark.kind]}, C = {benchmark.width}, T = {benchmark.tokens}; {_rounds(benchmark)}"
        legend = _LEGENDS[benchmark.kind] + (f" {_LEGENDS['cuda']}" if _on_cuda(benchmark) else "")
        parts += [*_section(title, benchmark, legend, width), Text()]
    return Group(*parts, *_end(_conditions(result.conditions), result.interrupted))


def target_view(result: TargetResult, width: int) -> RenderableType:
    """Return the table of a user's model for a terminal of `width` columns."""
    work = "training step: forward, backward, AdamW" if result.train else "forward pass"
    title = f"{result.model}, {result.sites} sites; one {work}; {_rounds(result.benchmark)}"
    before, after = result.load
    conditions = f"torch {result.torch}, {result.threads} threads; load {before:.1f} before, {after:.1f} after"
    section = _section(title, result.benchmark, _LEGENDS["target"], width)
    return Group(*section, *_end(conditions, result.interrupted))


def _conditions(c: Mapping[str, Any]) -> str:
    before, after = c["load"]
    widths, tokens = (", ".join(map(str, c[name])) for name in ("widths", "tokens"))
    return (
        f"{c['device']}, {c['cores']} cores, {c['threads']} threads ({c['wait_policy']} waiting); torch {c['torch']};"
        f" {c['dtype']}; C = {widths}; T = {tokens}; {c['layers']} layers, vocabulary {c['vocabulary']},"
        f" n = {c['streams']}, {c['iterations']} Sinkhorn iterations; load {before:.1f} before, {after:.1f} after"
        + "".join(
            f"\n{when}: {_gpu(state)}" for when, state in zip(("before", "after"), c.get("gpu", ()), strict=False)
        )
    )


def _gpu(state: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in state.items())


def _on_cuda(benchmark: Benchmark) -> bool:
    return any(row.host_seconds is not None for row in benchmark.rows)


def _rounds(benchmark: Benchmark) -> str:
    return f"{benchmark.rounds} round{'s' * (benchmark.rounds != 1)}"


def _section(title: str, benchmark: Benchmark, legend: str, width: int) -> list[RenderableType]:
    checks = [Text(_checks(row, row.checks)) for row in benchmark.rows if row.checks and row.seconds]
    messages = [Text(f"{row.name}: {row.message}", _COLOURS[row.status]) for row in benchmark.rows if row.message]
    kernels = [_kernel_table(benchmark)] if any(row.kernels for row in benchmark.rows) else []
    copied = [Text(_bandwidth(row)) for row in benchmark.rows if row.name == LIMIT and kernels and row.counters]
    return [
        Text(title, "italic"),
        *_tables(benchmark, width),
        Text(legend, "dim"),
        *copied,
        *kernels,
        *checks,
        *messages,
    ]


def _bandwidth(limit: Row) -> str:
    assert limit.counters is not None
    rate = limit.counters.bytes / limit.seconds["total"].median
    return f"limit: {limit.counters.bytes / 1e6:.1f} MB a site at {rate / 1e12:.3f} TB/s, the bandwidth of a copy"


def _kernel_table(benchmark: Benchmark) -> Table:
    """Return the kernels of one site, the longest of each candidate; the rest in one line."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("kernels of one site")
    for title in ("launches", "µs"):
        table.add_column(title, justify="right")
    for row in benchmark.rows:
        shown, rest = row.kernels[:_KERNELS], row.kernels[_KERNELS:]
        for kernel in shown:
            table.add_row(f"{row.name}: {kernel.name[:_NAME]}", f"{kernel.launches:.3g}", f"{1e6 * kernel.seconds:.1f}")
        if rest:
            launches, seconds = sum(one.launches for one in rest), sum(one.seconds for one in rest)
            table.add_row(f"{row.name}: {len(rest)} others", f"{launches:.3g}", f"{1e6 * seconds:.1f}")
    return table


def _checks(row: Row, checks: Checks) -> str:
    share = checks.seconds / row.seconds["total"].median
    return (
        f"{row.name}: its checks at run time are {checks.calls} Python call{'s' * (checks.calls != 1)},"
        f" {1000 * checks.seconds:.2g} ms under a profiler: {100 * share:.2g} % of the total"
    )


def _end(conditions: str, interrupted: bool) -> list[RenderableType]:
    return [Text(conditions), *([Text("Interrupted: complete rounds only.", "yellow")] if interrupted else [])]


def _tables(benchmark: Benchmark, width: int) -> list[Table]:
    """Return one table, or times and counts apart if `width` columns are too few for both."""
    per = "" if benchmark.kind == "site" else "\n/site"
    times = ("forward\nms", "backward\nms", "total ms\n(quartiles)", "×\nplain", "+ ms\n/site", "of\nlimit")
    counts: tuple[str, ...] = (f"kernels{per}", f"MB{per}", "saved\nMB", "peak\nMB", "compile\ns")
    if _on_cuda(benchmark):
        counts = (*counts, "peak ×\nplain", "host\nms")
    titles, split = (*times, *counts), len(times)
    parts = [slice(None)] if width >= WIDE else [slice(split), slice(split, None)]
    return [_table(benchmark, titles[part], part) for part in parts]


def _table(benchmark: Benchmark, titles: Sequence[str], part: slice) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("candidate", no_wrap=True)
    for one in titles:
        table.add_column(one, justify="right", min_width=16 if "quartiles" in one else None)
    for row in benchmark.rows:
        if row.status == "ok":
            table.add_row(row.name, *_cells(row, benchmark.kind != "site")[part][: len(titles)])
        elif part.start is None:
            table.add_row(Text(row.name, _COLOURS[row.status]), row.status)
    return table


def _cells(row: Row, model: bool) -> Sequence[str]:
    total = row.seconds["total"]
    counted = row.plus if model else row.counters
    return (
        _ms(row.seconds["forward"].median),
        _ms(row.seconds["backward"].median),
        f"{_ms(total.median)} ({_ms(total.low)}–{_ms(total.high)})",
        f"{row.ratio['total'].median:.2f}" if row.ratio else "–",
        _ms(row.extra.median) if row.extra else "–",
        f"{100 * row.share:.0f} %" if row.share is not None else "–",
        _kernels(counted),
        _megabytes(counted.bytes or None if counted else None),
        _megabytes(row.saved_bytes),
        _megabytes(row.peak_bytes),
        f"{row.compile_seconds:.1f}" if row.compile_seconds is not None else "–",
        f"{row.peak_ratio:.2f}" if row.peak_ratio is not None else "–",
        _ms(row.host_seconds) if row.host_seconds is not None else "–",
    )


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{next((n for n, top in ((3, 0.1), (2, 10), (1, 100)) if abs(value) < top), 0)}f}"


def _megabytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


def _kernels(counters: Counters | None) -> str:
    if counters is None or not (counters.kernels or counters.externs):
        return "–"
    return f"{counters.kernels:.3g} + {counters.externs:.3g}"


def chart(result: Result) -> Any:
    """Return a figure with a panel for each benchmark: the cost over plain, with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = max((len(_shown(benchmark)) for benchmark in result.benchmarks), default=1)
    panels = max(1, len(result.benchmarks))
    figure = Figure(figsize=(6.5 * panels, 2.0 + 0.45 * bars), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, benchmark in zip(figure.subplots(1, panels, squeeze=False)[0], result.benchmarks, strict=False):
        _panel(axes, benchmark)
    conditions = "\n".join(textwrap.wrap(_conditions(result.conditions), 95 * panels))
    figure.supxlabel(conditions, fontsize=7, color="0.35")
    return figure


def _shown(benchmark: Benchmark) -> list[Row]:
    return [row for row in benchmark.rows if row.status == "ok" and row.name != PLAIN and row.extra and row.ratio]


def _panel(axes: Any, benchmark: Benchmark) -> None:
    """Draw a model as percent over plain, and a site, whose plain form costs little, in ms."""
    rows = _shown(benchmark)[::-1]
    model = benchmark.kind != "site"
    for place, row in enumerate(rows):
        value = row.ratio["total"] if model else row.extra
        assert value is not None
        low, median, high = (100 * (x - 1) if model else 1000 * x for x in (value.low, value.median, value.high))
        colour = "tab:orange" if row.name.startswith("ours") else "0.45" if row.name == LIMIT else "tab:blue"
        whiskers = [[max(0.0, median - low)], [max(0.0, high - median)]]
        axes.barh(place, median, xerr=whiskers, color=colour, height=0.65, error_kw={"elinewidth": 1, "capsize": 2})
        text = f"{median:+.0f} %" if model else f"{median:.2f} ms"
        axes.annotate(text, (max(high, 0.0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.margins(x=0.18)
    title = _TITLES[benchmark.kind].partition(":")[0]
    over = "the plain model, %" if model else "a plain add, forward + backward, ms"
    axes.set_xlabel(f"{title.lower()} over {over}")
    tokens = f", T = {benchmark.tokens}" if benchmark.tokens else ""
    axes.set_title(f"{title}{tokens}, median and quartiles of {benchmark.rounds} rounds", fontsize=10)
    axes.grid(axis="x", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
