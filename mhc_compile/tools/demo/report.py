"""The figures of a run as plain data, and their renderings: a picture and a table."""

from __future__ import annotations

import math
import os
import platform
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import mhc_compile
import mhc_compile.results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from mhc_compile.tools.demo.train import PairedTraining

#: Steps in a smoothed training loss.
SMOOTHED = 20


def conditions() -> dict[str, Any]:
    """Return versions and threads, on which the last bits of the numbers depend."""
    import transformers

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {**versions, "transformers": transformers.__version__, "threads": torch.get_num_threads()}


def collect(training: PairedTraining, conditions: dict[str, Any]) -> dict[str, Any]:
    """Return every figure of a run that has trained at least one step, as `result.json` holds them.

    Validate the models if the last step was not validated, and run mhc once more to measure its
    streams.

    model, steps, unit   class, length of the run, element of a sequence ("byte" or "patch")
    settings             every option that decides the numbers
    data                 files and bytes of both splits, and a digest of all of it
    conditions           versions, threads, and how OpenMP's threads wait for each other
    sites                residual adds that are hyper-connections
    chance               loss of a uniform guess
    plain, mhc           one entry per model, with what begins with a dot here
    .parameters          number of parameters
    .loss                training loss of every step, in nats per target
    .validation          [step, loss] pairs; the last is the final one
    .final               mean training loss of the last 20 steps
    .step_seconds        median seconds of a step, without those that compiled
    .tokens_per_second   from that median
    .compile_seconds     first forward and backward of each process (mhc: and attaching)
    first_step           training loss of both before any update, and the difference
    ratio                tokens per second, mhc / plain
    seeds                this run and those of further seeds: seed, and the validations of both
    gain                 Amax of the composite H_res over depth, forward and backward
    streams_distance     rms deviation of the streams from their mean over it, per site
    streams_close        a sentence if the streams have hardly parted, ""
    """
    settings, task = training.settings, training.task
    training.validate()
    models: dict[str, dict[str, Any]] = {
        name: {
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "loss": trainer.losses,
            "validation": [[step, losses[name]] for step, losses in training.validation.items()],
            "final": statistics.fmean(trainer.losses[-SMOOTHED:]),
            "step_seconds": trainer.step_seconds,
            "tokens_per_second": settings.batch * settings.context / trainer.step_seconds,
            "compile_seconds": trainer.compile_seconds,
        }
        for name, trainer in training.trainers.items()
    }
    first = {name: figures["loss"][0] for name, figures in models.items()}
    splits = {"train": task.corpus.train, "validation": task.corpus.validation}
    data = {name: {"files": len(split.contents), "bytes": len(split.data)} for name, split in splits.items()}
    wait_policy = os.environ.get("OMP_WAIT_POLICY", "default").lower()
    streams = training.measure_streams()
    validations = {name: figures["validation"] for name, figures in models.items()}
    return {
        "model": type(training.trainers["mhc"].model).__name__,
        "steps": training.step,
        "unit": task.unit,
        "settings": asdict(settings),
        "data": {**data, "digest": task.corpus.digest},
        "conditions": {**conditions, "mhc_compile": mhc_compile.__version__, "wait_policy": wait_policy},
        "sites": len(streams.sites),
        "chance": math.log(task.classes),
        **models,
        "first_step": {**first, "difference": first["mhc"] - first["plain"]},
        "ratio": models["mhc"]["tokens_per_second"] / models["plain"]["tokens_per_second"],
        "seeds": [{"seed": settings.seed, **validations}],
        "gain": {
            "forward": max(site.composite_forward for site in streams.sites),
            "backward": max(site.composite_backward for site in streams.sites),
        },
        "streams_distance": [site.entering.distance for site in streams.sites],
        "streams_close": streams.close_streams,
    }


def smooth(values: Sequence[float], window: int = SMOOTHED) -> list[float]:
    """Return trailing means over `window` values, over fewer at the beginning."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _conditions_line(result: dict[str, Any]) -> str:
    s, unit = result["settings"], "bytes" if result["unit"] == "byte" else "patches"
    return (
        f"{result['model']}, {s['layers']} layer{'s' * (s['layers'] > 1)}, C = {s['width']},"
        f" batch {s['batch']} × {s['context']} {unit}, seed {s['seed']}, {s['inner_backend']}"
    )


def draw(result: dict[str, Any]) -> Any:
    """Return a matplotlib figure of 1280 × 1120 pixels: the losses above, mhc − plain below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    losses, gap = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    plain, mhc, steps = result["plain"], result["mhc"], range(1, result["steps"] + 1)
    mean = f"training (mean of {SMOOTHED} steps)"
    for name, colour, line, marker in (("plain", "tab:blue", "-", "o"), ("mhc", "tab:orange", "--", "x")):
        training, validation = result[name]["loss"], result[name]["validation"]
        losses.plot(steps, smooth(training), line, color=colour, label=f"{name}, {mean}")
        label = f"{name}, validation {validation[-1][1]:.4f}"
        losses.plot(*zip(*validation, strict=True), marker, color=colour, label=label)
    chance = result["chance"]
    losses.axhline(chance, color="0.7", linewidth=0.8, linestyle=":", label=f"uniform guess {chance:.2f}")
    difference = [b - a for a, b in zip(plain["loss"], mhc["loss"], strict=True)]
    runs = [list(zip(*_differences(one), strict=True)) for one in result["seeds"]]
    gap.axhline(0.0, color="0.5", linewidth=0.8)
    gap.plot(steps, smooth(difference), "-", color="tab:orange", label=mean)
    gap.plot(*runs[0], "kx", label="validation")
    for one, run in zip(result["seeds"][1:], runs[1:], strict=True):
        gap.plot(*run, "+:", color="0.6", linewidth=0.8, label=f"validation, seed {one['seed']}")
    per = "nats per byte" if result["unit"] == "byte" else "nats per image"
    losses.set_ylabel(f"loss ({per})")
    gap.set_ylabel(f"mhc − plain\n({per})")
    gap.set_xlabel("training steps")
    for axes in (losses, gap):
        axes.legend(frameon=False)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Plain residual and mHC from the same weights, on the same batches"
    figure.suptitle(f"{title}\n{_conditions_line(result)}", fontsize=10)
    return figure


def print_summary(
    console: Console, result: dict[str, Any], explanation: mhc_compile.results.Explanation, files: Sequence[Path]
) -> None:
    """Print the site report, the table of figures, and the paths of the files."""
    from rich.table import Column, Table

    models = [result["plain"], result["mhc"]]
    unit = "bytes" if result["unit"] == "byte" else "patches"
    table = Table("", *(Column(name, justify="right") for name in ("plain", "mhc")))
    table.add_row("parameters", *(f"{model['parameters']:,}" for model in models))
    table.add_row("loss before any update", *(f"{model['loss'][0]:.6f}" for model in models))
    table.add_row(f"training loss, last {SMOOTHED} steps", *(f"{model['final']:.4f}" for model in models))
    table.add_row("validation loss", *(f"{model['validation'][-1][1]:.4f}" for model in models))
    table.add_row("median step", *(f"{1000 * model['step_seconds']:.1f} ms" for model in models))
    table.add_row(f"{unit} per second", *(f"{model['tokens_per_second']:,.0f}" for model in models))
    compilation = (" + ".join(f"{value:.1f}" for value in model["compile_seconds"]) for model in models)
    table.add_row("compilation", *(f"{seconds} s" for seconds in compilation))
    console.print(explanation)
    console.print()
    console.print(f"After {result['steps']} steps: {_conditions_line(result)}", markup=False, highlight=False)
    console.print(table)
    console.print(_notes(result), markup=False, highlight=False)
    console.print(f"Written: {', '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)


def _differences(run: dict[str, Any]) -> list[tuple[int, float]]:
    """Return [step, mhc - plain] of the validations of an entry of `seeds`."""
    return [(step, b - a) for (step, a), (_, b) in zip(run["plain"], run["mhc"], strict=True)]


def _outcome(seeds: list[dict[str, Any]]) -> str:
    """Return what the last validations of all seeds say, as the end of a sentence."""
    gaps = [_differences(run)[-1][1] for run in seeds]
    mean = statistics.fmean(gaps)
    ends = f"mhc ends {abs(mean):.3f} nats {'below' if mean < 0 else 'above'} plain"
    if len(gaps) == 1:
        return f"{ends}, in one run; --seeds 4 shows how much of it is chance."
    each = ", ".join(f"{gap:+.3f} with seed {run['seed']}" for gap, run in zip(gaps, seeds, strict=True))
    return f"{ends}, the mean of {len(gaps)} runs: {each}. Their spread is chance."


def _notes(result: dict[str, Any]) -> str:
    data, gain, conditions = result["data"], result["gain"], result["conditions"]
    size = (data["train"]["bytes"] + data["validation"]["bytes"]) / 1e6
    close = f"Note: {result['streams_close']}.\n" if result["streams_close"] else ""
    threads, others = conditions["threads"], len(result["seeds"]) - 1
    busy = f", next to {others} run{'s' * (others > 1)} of another seed" if others else ""
    return f"""\
Same start: the losses before any update differ by {abs(result["first_step"]["difference"]):.1e}.
Validation loss: {_outcome(result["seeds"])}
Speed: mhc runs at {result["ratio"]:.2f} × the plain model's tokens per second (medians of steps run in turn, \
{threads} thread{"s" * (threads > 1)}, {conditions["wait_policy"]} waiting{busy}).
Gain of the composite H_res, Amax over {result["sites"]} sites: {gain["forward"]:.4f} forward, \
{gain["backward"]:.4f} backward (1 is neither growth nor decay).
Streams: they differ from their mean by {100 * max(result["streams_distance"]):.1f} % of it at the entry of the site \
where they differ most (0 % at the start).
{close}Data: {data["train"]["files"]} files to train on, {data["validation"]["files"]} others to validate on, {size:.1f} MB \
of this Python's standard library. A uniform guess has loss {result["chance"]:.2f}.
A run this short and small shows that the rewrite trains, what it costs here and that it stays stable. \
It says nothing about the benefit of hyper-connections at scale (examples/stability has longer ones, with intervals)."""
