"""`mhc bench`."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.shared import ModelCall, model_command, print_json, result_console, write
from mhc_compile.config.options import Options
from mhc_compile.tools.bench.candidates import UnknownNameError, choose

if TYPE_CHECKING:
    from mhc_compile.cli.targets import Target
    from mhc_compile.tools.bench.results import Result, TargetResult

_FILE = click.Path(dir_okay=False, path_type=Path)
#: Sizes of --quick, which shows that everything runs; the figures mean little.
_QUICK: dict[str, Any] = {"widths": (64,), "layers": 1, "tokens": (128,), "vocabulary": 512, "iterations": 2}
#: Of the forward: decoding, and sequences so short that calls cost more than memory.
_FORWARD: dict[str, Any] = {"tokens": (1, 16, 128), "layers": 6, "vocabulary": 2048}
#: On CUDA: a width of the paper's and a larger one, few blocks, and a small head.
_CUDA: dict[str, Any] = {"widths": (2560, 4096), "layers": 2, "tokens": (4096,), "vocabulary": 2048, "seconds": 540}
#: Parameters of the benchmark without TARGET, of the one with it, and of --tune.
_SIZES = ("widths", "layers", "tokens", "vocabulary")
_NOT_OF_A_TARGET = ("kind", "only", "png_file", "processes", "seconds", *_SIZES)
_OF_A_TARGET = ("settings", "full_size", "train", "weights")
_TUNE = {"tune_file", "widths", "tokens", "device", "dtype", "quiet", "preset", "streams", "mapping", "single_pass"}
_FLAGS = {"kind": "--benchmark", "png_file": "--png", "tune_file": "--tune", "widths": "--width"}


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _known(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:  # noqa: ARG001 - click's signature
    try:
        choose(value)
    except UnknownNameError as error:
        raise click.UsageError(str(error)) from error
    return value


@model_command("bench", optional=True, json_flag=False)
@click.option(
    "--width",
    "widths",
    type=click.IntRange(8),
    multiple=True,
    default=(256,),
    help="Width C; GPT-2 has 768; repeatable.  [default: 256; cuda 2560 and 4096]",
)
@click.option(
    "--layers", type=click.IntRange(1), default=4, help="Blocks of the model.  [default: 4; forward 6; cuda 2]"
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    multiple=True,
    default=(1024,),
    help="Sequence length T; batch is 1; repeatable.  [default: 1024; forward 1, 16 and 128; cuda 4096]",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(2),
    default=50257,
    help="Of the tied head.  [default: 50257; forward and cuda 2048]",
)
@click.option(
    "--benchmark",
    "kind",
    type=click.Choice(["site", "step", "both", "forward"]),
    default="both",
    show_default=True,
    help="What runs; both: site and step.",
)
@click.option("--only", multiple=True, callback=_known, metavar="NAME", help="A candidate, with plain; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Every candidate once in each.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [default: as many as cores]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cpu; with TARGET the model's own]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: float32; cuda bfloat16]")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Compile ahead in so many, each a candidate; 1: one after the other.  [default: 1; cuda: the cores]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    help="Time for everything; rows that do not fit are left out and named.  [default: none; cuda 540]",
)
@click.option("--quick", is_flag=True, help="Tiny sizes, 3 rounds and warm caches: does everything run?")
@click.option("--tune", "tune_file", type=_FILE, metavar="FILE", help="Search for faster Triton kernels; write FILE.")
@click.option("--json", "json_file", type=_FILE, metavar="FILE", help="Write every figure; - for stdout alone.")
@click.option("--png", "png_file", type=_FILE, metavar="FILE", help="Draw the overhead over plain.")
def command(
    call: ModelCall,
    *,
    kind: str,
    only: tuple[str, ...],
    rounds: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    processes: int | None,
    seconds: float | None,
    quick: bool,
    tune_file: Path | None,
    json_file: Path | None,
    png_file: Path | None,
    **sizes: Any,
) -> None:
    """Measure the cost of hyper-connections, of other implementations and of the physical limit.

    All candidates and the plain model run in the same rounds.

    With TARGET, measure that model: a training step (with --eval a forward pass) plain and
    rewritten, under Inductor, and plain in eager.

    The step trains a GPT-2-shaped model; all candidates have the same blocks, and only the residual
    connection differs. The site is the part between two branches: streams and a branch output in,
    new streams and the next branch input out. The forward is one of the same model without
    gradients, for one token as in decoding, and for short sequences.

    Candidates: plain, ours, ours-block and ours-none (other `recompute`), deepseek-v4 and
    deepseek-v4-eager (transformers), hyper-connections (PyPI), on CUDA liger, liger-eager and
    tilekernels; limit is a copy of the bytes that must move and the products that must be computed,
    on CUDA the bytes alone. Without --only, --device cuda measures plain, ours, two presets,
    deepseek-v4, liger and limit. A candidate that is not installed is a row that says so: pip
    install "mhc-compile[bench]".

    Exit codes: 0 success, 1 a candidate failed, 2 wrong usage, 130 interrupted (complete rounds are
    shown).
    """
    ctx, options = click.get_current_context(), call.options
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    rounds = 3 if quick and "rounds" not in given else rounds
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see `mhc demo`; read when torch is loaded
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.UsageError("--device cuda: this torch sees no CUDA device")
    if tune_file is not None and (device != "cuda" or given - _TUNE):
        taken, found = (" ".join(sorted(map(_flag, names))) for names in (_TUNE - {"tune_file"}, given))
        raise click.UsageError(f"--tune: expected --device cuda, and of the others {taken}; found {found}")
    if tune_file is not None and len(sizes["tokens"]) > 1:
        raise click.UsageError(f"--tune: {len(sizes['tokens'])} --tokens; a configuration is one for every T: give one")
    loaded: Target | None = None
    if call.target:
        if foreign := ", ".join(_flag(name) for name in _NOT_OF_A_TARGET if name in given):
            raise click.UsageError(f"{foreign}: of the benchmark without TARGET; {call.target!r} has its own sizes")
        loaded = call.loaded
    else:
        own = [*sorted(set(options) - {"iterations"}), *(name for name in _OF_A_TARGET if name in given)]
        if own and tune_file is None:
            raise click.UsageError(f"{', '.join(own)}: for a TARGET; the benchmark without one sets its own options")
        if png_file is not None and find_spec("matplotlib") is None:
            raise click.UsageError('--png needs matplotlib: pip install "mhc-compile[bench]"')
        sizes["iterations"], sizes["streams"] = options.get("iterations", 20), options.get("streams", 4)
        chosen = (_CUDA, device == "cuda"), (_FORWARD, kind == "forward"), (_QUICK, quick)
        defaults = {name: value for values, wanted in chosen if wanted for name, value in values.items()}
        seconds = defaults.pop("seconds", math.inf) if seconds is None else seconds
        sizes |= {name: value for name, value in defaults.items() if name in sizes and name not in given}

    import torch  # after OMP_WAIT_POLICY
    from rich.console import Console

    from mhc_compile.reporting.conditions import available_cores
    from mhc_compile.reporting.progress import choose_progress
    from mhc_compile.tools.bench.measure import run
    from mhc_compile.tools.bench.report import chart, target_view, view
    from mhc_compile.tools.bench.sites import Shape

    if threads is not None:
        torch.set_num_threads(threads)
    width, cold = result_console().width, not quick
    result: Result | TargetResult
    with choose_progress(Console(stderr=True), quiet=call.quiet) as progress:
        if loaded is not None:
            result = _time_target(loaded, options, device, dtype, rounds=rounds, cold=cold, progress=progress)
            shown = target_view(result, width)
        else:
            where = device or "cpu"
            dtype = dtype or ("bfloat16" if where == "cuda" else "float32")
            pairs = product(sizes.pop("widths"), sizes.pop("tokens"))
            shapes = [Shape(width=width, tokens=tokens, device=where, dtype=dtype, **sizes) for width, tokens in pairs]
            if tune_file is not None:
                from mhc_compile.tools.bench.tune import tune

                tune_file.parent.mkdir(parents=True, exist_ok=True)
                tune_file.write_text(json.dumps(tune(shapes, Options.parse(options), progress), indent=2) + "\n")
                return
            kinds = ("site", "step") if kind == "both" else (kind,)
            result = run(
                shapes,
                only=only,
                kinds=kinds,
                rounds=rounds,
                cold=cold,
                processes=processes or (available_cores() if where == "cuda" else 1),
                seconds=math.inf if seconds is None else seconds,
                progress=progress,
            )
            shown = view(result, width)
            if png_file is not None:
                png_file.parent.mkdir(parents=True, exist_ok=True)
                chart(result).savefig(png_file)
    if json_file == Path("-"):
        print_json(result.to_dict())
    else:
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        write(shown)
    if result.interrupted:
        sys.exit(130)
    if result.failed:
        raise click.exceptions.Exit(1)


def _time_target(
    loaded: Target, options: dict[str, Any], device: str | None, dtype: str | None, **how: Any
) -> TargetResult:
    import torch

    from mhc_compile._torch.fx import tree_map_only
    from mhc_compile.tools.bench.user_model import measure_target

    model, inputs = loaded.model, (loaded.args, loaded.kwargs)
    if not isinstance(model, torch.nn.Module):
        raise click.UsageError(
            f"{loaded.name}: an exported program is one graph already; give the model that it was exported from"
        )
    if device is not None or dtype is not None:
        real = getattr(torch, dtype) if dtype is not None else None

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, real if value.is_floating_point() else None)

        model = model.to(device=device, dtype=real)
        inputs = tree_map_only(torch.Tensor, move, inputs)
    args, kwargs = inputs
    return measure_target(loaded.name, model, args, kwargs, Options.parse(options), **how)
