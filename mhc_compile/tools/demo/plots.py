"""Both loss curves and their difference: in the terminal, and as a PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.demo.result import SMOOTHED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["conditions_line", "draw", "smooth", "terminal_plots", "write_png"]

PLAIN_COLOUR, MHC_COLOUR = "tab:blue", "tab:orange"
#: 256-colour codes of the same two in a terminal; 8 for the zero line.
PLAIN_CODE, MHC_CODE, ZERO_CODE = 39, 208, 8


def smooth(values: Sequence[float], window: int = SMOOTHED) -> list[float]:
    """Trailing means over `window` values, over fewer at the beginning."""
    means = []
    total = 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def conditions_line(result: dict[str, Any]) -> str:
    """What the curves were measured under, in one line."""
    settings = result["settings"]
    return (
        f"{result['model']}, {settings['layers']} layer{'s' * (settings['layers'] > 1)}, C = {settings['width']},"
        f" batch {settings['batch']} × {settings['context']}"
        f" {'bytes' if result['unit'] == 'byte' else 'patches'}, seed {settings['seed']}, {settings['inner_backend']}"
    )


def _difference(result: dict[str, Any]) -> tuple[list[float], list[list[float]]]:
    """Mhc − plain: smoothed over the training steps, and at the validations."""
    training = [b - a for a, b in zip(result["plain"]["loss"], result["mhc"]["loss"], strict=True)]
    points = zip(result["plain"]["validation"], result["mhc"]["validation"], strict=True)
    return smooth(training), [[step, b - a] for (step, a), (_, b) in points]


def _per(result: dict[str, Any]) -> str:
    return "nats per byte" if result["unit"] == "byte" else "nats per image"


def terminal_plots(result: dict[str, Any], width: int) -> list[str]:
    """Two plots for a terminal of `width` columns, with ANSI colours: the losses, and mhc − plain."""
    import plotext

    def curve(figure: Any, points: Sequence[Sequence[float]], label: str, code: int, marker: str) -> None:
        steps, values = zip(*points, strict=True)
        signal = figure.signal(steps, values, marker=plotext.marker(marker, code))
        if label:
            signal.label(label)
        if marker == "braille":
            signal.lines()
        figure.draw(signal)

    def figure(title: str, height: int) -> Any:
        new = plotext.figure
        new.clear()
        new.theme("colorless")
        new.plot_size(width, height)
        new.title(title)
        new.label("steps")
        marks = sorted({round(result["steps"] * i / 4) for i in range(5)})
        new.ruler("x").ticks(marks, [str(mark) for mark in marks])
        return new

    losses = figure(f"loss, {_per(result)}; training: mean of {SMOOTHED} steps; mhc is drawn over plain", 18)
    for name, code, circle in (("plain", PLAIN_CODE, "○"), ("mhc", MHC_CODE, "●")):
        curve(losses, list(enumerate(smooth(result[name]["loss"]), 1)), f"{name}, training", code, "braille")
        curve(losses, result[name]["validation"], f"{name}, validation", code, circle)
    losses.legend(x=max(0, width - 32), y=0)
    texts = [losses.build().string()]
    training, validation = _difference(result)
    gap = figure(f"mhc − plain, {_per(result)}; below 0, mhc has the lower loss", 12)
    curve(gap, [[1, 0.0], [max(2, result["steps"]), 0.0]], "", ZERO_CODE, "braille")
    curve(gap, list(enumerate(training, 1)), "", MHC_CODE, "braille")
    curve(gap, validation, "", MHC_CODE, "●")
    texts.append(gap.build().string())
    return texts


def write_png(result: dict[str, Any], path: Path) -> None:
    """The same two plots as a PNG of 1280 × 1120 pixels."""
    draw(result).savefig(path)


def draw(result: dict[str, Any]) -> Any:
    """The matplotlib figure: losses above, mhc − plain below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gap = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for name, colour in (("plain", PLAIN_COLOUR), ("mhc", MHC_COLOUR)):
        side = result[name]
        line = "-" if name == "plain" else "--"
        steps = range(1, len(side["loss"]) + 1)
        losses.plot(
            steps, smooth(side["loss"]), line, color=colour, label=f"{name}, training (mean of {SMOOTHED} steps)"
        )
        marker = {"marker": "o" if name == "plain" else "x", "linestyle": "none", "color": colour}
        losses.plot(
            *zip(*side["validation"], strict=True),
            **marker,
            label=f"{name}, validation {side['validation'][-1][1]:.4f}",
        )
    losses.axhline(
        result["chance"], color="0.7", linewidth=0.8, linestyle=":", label=f"uniform guess {result['chance']:.2f}"
    )
    losses.set_ylabel(f"loss ({_per(result)})")
    losses.legend(frameon=False)
    training, validation = _difference(result)
    gap.axhline(0.0, color="0.5", linewidth=0.8)
    gap.plot(range(1, len(training) + 1), training, "-", color=MHC_COLOUR, label=f"training (mean of {SMOOTHED} steps)")
    gap.plot(*zip(*validation, strict=True), "kx", label="validation")
    gap.set_ylabel(f"mhc − plain\n({_per(result)})")
    gap.set_xlabel("training steps")
    gap.legend(frameon=False)
    for axes in (losses, gap):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Plain residual and mHC from the same weights, on the same batches\n{conditions_line(result)}", fontsize=10
    )
    return figure
