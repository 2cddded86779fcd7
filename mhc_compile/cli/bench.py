"""`mhc bench`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.shared import Command, backend_options, open_target, optional_target, weights_given, write
from mhc_compile.config.options import Options
from mhc_compile.tools.bench.names import UnknownNameError, check_names

if TYPE_CHECKING:
    from mhc_compile.cli.targets import Target
    from mhc_compile.tools.bench.target import TargetResult

__all__ = ["command"]

_FILE = click.Path(dir_okay=False, path_type=Path)
#: What --quick sets: everything runs, nothing means much.
_QUICK = {"width": 64, "layers": 1, "tokens": 128, "vocabulary": 512, "iterations": 2}
_QUICK_ROUNDS = 3
#: Parameters that say something of a TARGET alone.
_OF_A_TARGET = ("settings", "full_size", "train")


def _known(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG001 - click's signature
    try:
        check_names(value)
    except UnknownNameError as error:
        raise click.UsageError(str(error)) from error
    return value


@click.command("bench", cls=Command)
@optional_target
@click.option("--width", type=click.IntRange(8), default=256, show_default=True, help="Width C; GPT-2 has 768.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Blocks of the training step.")
@click.option("--tokens", type=click.IntRange(8), default=1024, show_default=True, help="Sequence length; batch is 1.")
@click.option("--vocabulary", type=click.IntRange(2), default=50257, show_default=True, help="Of the tied head.")
@click.option(
    "--benchmark",
    "kind",
    type=click.Choice(["site", "step", "both"]),
    default="both",
    show_default=True,
    help="One site by itself, a training step, or both.",
)
@click.option(
    "--only", multiple=True, callback=_known, metavar="NAME", help="A contender to measure beside plain; repeatable."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds; every contender once in each."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: as many as cores]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: float32; cuda bfloat16]")
@click.option("--busy", is_flag=True, help="Keep every core busy with something else while timing.")
@click.option("--quick", is_flag=True, help="Tiny sizes, 3 rounds and warm caches: does everything run?")
@click.option(
    "--json", "json_file", type=_FILE, metavar="FILE", help="Write every figure and sample; - for stdout alone."
)
@click.option("--png", "png_file", type=_FILE, metavar="FILE", help="Draw the overhead over plain.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    kind: str,
    only: tuple[str, ...],
    rounds: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    busy: bool,
    quick: bool,
    json_file: Path | None,
    png_file: Path | None,
    quiet: bool,
    target: str | None,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    width: int,
    layers: int,
    tokens: int,
    vocabulary: int,
    **flags: Any,
) -> None:
    """Measure what hyper-connections cost: ours, other implementations, the plain model and the physical limit, in the same rounds.

    With TARGET, that model instead: a training step (with --eval a forward pass) plain and rewritten, under Inductor, and plain in eager.

    The step trains a GPT-2-shaped model; all contenders have the same blocks, and only the residual connection differs. The site is what lies
    between two branches: streams and a branch output in, new streams and the next branch input out.

    Contenders: plain, ours, ours-block and ours-none (other `recompute`), deepseek-v4 and deepseek-v4-eager (transformers),
    hyper-connections (PyPI), on CUDA liger, liger-eager and tilekernels; limit is a copy of the bytes that must move and the products that
    must be taken. One that is not installed is a row that says so: pip install "mhc-compile[bench]".

    Exit codes: 0 fine, 1 a contender failed, 2 wrong usage, 130 interrupted (complete rounds are shown).
    """
    options = backend_options(flags)
    sizes = {"width": width, "layers": layers, "tokens": tokens, "vocabulary": vocabulary}
    given = {name for name in (*sizes, "rounds", "kind") if _is_given(ctx, name)}
    if quick:
        rounds = rounds if "rounds" in given else _QUICK_ROUNDS
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see `mhc demo`; read when torch is loaded
    _check_device(device)
    if target is not None:
        foreign = sorted({"only", *given} - {"rounds"}) if only else sorted(given - {"rounds"})
        if foreign or png_file is not None:
            names = ", ".join("--benchmark" if name == "kind" else f"--{name}" for name in foreign) or "--png"
            raise click.UsageError(f"{names}: of the benchmark without TARGET; {target!r} has its own sizes")
        loaded = open_target(target, settings, full_size=full_size, train=train)
        timed = _time(loaded, options, rounds, threads, device, dtype, busy, quick, quiet)
        _show(timed, json_file)
        if timed.interrupted:
            sys.exit(130)
        if timed.failed:
            raise click.exceptions.Exit(1)
        return
    foreign = sorted(set(options) - {"iterations"}) + [name for name in _OF_A_TARGET if _is_given(ctx, name)]
    if weights_given() is not None:
        foreign.append("weights")
    if foreign:
        raise click.UsageError(f"{', '.join(foreign)}: for a TARGET; the benchmark without one sets its own options")
    sizes["iterations"] = options.get("iterations", 20)
    if quick:
        sizes |= {name: value for name, value in _QUICK.items() if not _is_given(ctx, name)}
    if png_file is not None and find_spec("matplotlib") is None:
        raise click.UsageError('--png needs matplotlib: pip install "mhc-compile[bench]"')
    result = _measure(kind, only, rounds, threads, device, dtype, busy, quick, quiet, sizes)
    if json_file is not None:
        _write_json(result.to_dict(), json_file)
    if json_file is None or str(json_file) != "-":
        from rich.console import Console

        from mhc_compile.tools.bench.table import render

        render(Console(), result)
    if png_file is not None:
        from mhc_compile.tools.bench.chart import write_png

        png_file.parent.mkdir(parents=True, exist_ok=True)
        write_png(result, png_file)
    if result.interrupted:
        sys.exit(130)
    if result.failed:
        raise click.exceptions.Exit(1)


def _check_device(device: str | None) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.UsageError("--device cuda: this torch sees no CUDA device")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _show(timed: TargetResult, json_file: Path | None) -> None:
    if json_file is not None:
        _write_json(timed.to_dict(), json_file)
    if json_file is None or str(json_file) != "-":
        write(timed)


def _time(
    loaded: Target,
    options: dict[str, Any],
    rounds: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    busy: bool,
    quick: bool,
    quiet: bool,
) -> TargetResult:
    import torch
    from rich.console import Console

    from mhc_compile._torch import map_tensors
    from mhc_compile.reporting.progress import choose_progress
    from mhc_compile.tools.bench.target import measure_target

    if not isinstance(loaded.model, torch.nn.Module):
        raise click.UsageError(
            f"{loaded.name}: an exported program is one graph already; give the model that it was exported from"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    model, inputs = loaded.model, (loaded.args, loaded.kwargs)
    if device is not None or dtype is not None:
        real = getattr(torch, dtype) if dtype is not None else None

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, real if value.is_floating_point() else None)

        model = model.to(device=device, dtype=real)
        inputs = map_tensors(move, inputs)
    args, kwargs = inputs
    with choose_progress(Console(stderr=True), quiet=quiet) as progress:
        return measure_target(
            loaded.name,
            model,
            args,
            kwargs,
            Options.parse(options),
            rounds=rounds,
            busy=busy,
            cold=not quick,
            progress=progress,
        )


def _measure(
    kind: str,
    only: tuple[str, ...],
    rounds: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    busy: bool,
    quick: bool,
    quiet: bool,
    sizes: dict[str, Any],
) -> Any:
    import torch
    from rich.console import Console

    from mhc_compile.reporting.progress import choose_progress
    from mhc_compile.tools.bench.run import Request, run
    from mhc_compile.tools.bench.shape import Shape

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(device=where, dtype=dtype or ("bfloat16" if where == "cuda" else "float32"))
    request = Request(
        shape=replace(shape, **sizes),
        only=only,
        kinds=("site", "step") if kind == "both" else (kind,),
        rounds=rounds,
        threads=threads,
        busy=busy,
        cold=not quick,
    )
    with choose_progress(Console(stderr=True), quiet=quiet) as progress:
        return run(request, progress)


def _write_json(data: dict[str, Any], path: Path) -> None:
    text = json.dumps(data, indent=2)
    if str(path) == "-":
        click.echo(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
