"""`mhc demo`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mhc_compile.cli.shared import Command
from mhc_compile.tools.demo import MODELS, SEEDS, STEPS, Settings

_OUT = Path("runs/demo")
_FOLDER = click.Path(file_okay=False, path_type=Path)
_COMPILER = click.Choice(["inductor", "aot_eager", "eager"])
_D = Settings()


@click.command("demo", cls=Command)
@click.option("--model", type=click.Choice(MODELS), default=_D.model, show_default=True, help="From transformers.")
@click.option("--steps", type=click.IntRange(1), help=f"Length of the run.  [default: {STEPS}, or the checkpoint's]")
@click.option("--out", type=_FOLDER, default=_OUT, show_default=True, help="Folder for the results.")
@click.option("--resume", is_flag=True, help="Continue the checkpoint in --out, bit for bit. Settings come from it.")
@click.option("--seed", type=click.IntRange(0), default=_D.seed, show_default=True, help="Weights, batches, dropout.")
@click.option("--seeds", type=click.IntRange(1), default=SEEDS, show_default=True, help="Runs: --seed and those after.")
@click.option("--batch", type=click.IntRange(1), help="Sequences per step.  [default: 4; vit 16]")
@click.option("--context", type=click.IntRange(1), help="Bytes a sequence; vit: patches.  [default: 64]")
@click.option("--layers", type=click.IntRange(1), help="Transformer blocks.  [default: 12; vit 4]")
@click.option("--width", type=click.IntRange(32), help="C, a multiple of 32.  [default: 64; vit 128]")
@click.option("--dropout", type=click.FloatRange(0, 0.9), default=_D.dropout, show_default=True, help="Probability.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.  [default: 0.002; vit 0.0003]")
@click.option("--inner-backend", type=_COMPILER, default=_D.inner_backend, show_default=True, help="Of both models.")
@click.option("--save-every", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json on stdout and nothing else there.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    steps: int | None,
    seeds: int,
    out: Path,
    resume: bool,
    save_every: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a small transformer twice, plain and with hyper-connections, and compare.

    The model comes from transformers, unmodified; the data are the source files of this Python's
    standard library, byte by byte, split by file. Both models start from the same weights and see
    the same batches on the CPU, one step of each in turn. The only difference is the backend:
    torch.compile(model) and torch.compile(model, backend="mhc").

    --model vit classifies images instead: pieces of source, one byte a pixel, by the package that
    they come from.

    The second of --seeds, and further ones, run in processes of their own at the same time, as many
    as there are cores without work. What is shown and timed is the run of the first.

    Writes result.json (every figure), loss.png and checkpoint.pt to --out, those of other seeds to
    folders in it. Ctrl-C keeps the steps done so far; --resume continues them, also with more
    --steps: the learning rate depends on the step alone.

    Exit codes: 0 fine, 1 an error, 2 wrong usage, 130 interrupted.
    """
    # Threads that spin while they wait for each other make a step 25 times slower next to another
    # busy process. The variables are read when torch is loaded, below.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A step of the default size takes longer on two threads than on one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from rich.console import Console

    from mhc_compile.errors import MhcError, OptionError
    from mhc_compile.reporting.progress import choose_progress

    if missing := [name for name in ("transformers", "matplotlib") if find_spec(name) is None]:
        raise MhcError(f'the demo needs {", ".join(missing)}: pip install "mhc-compile[demo]"')
    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in options.items() if ctx.get_parameter_source(name) is not default}
    session = None
    try:
        with choose_progress(Console(stderr=True), quiet=quiet) as progress:
            progress.phase("loading transformers and the data")
            from mhc_compile.tools.demo.report import print_summary
            from mhc_compile.tools.demo.session import Session

            session = Session(out, given, steps, seeds, resume, save_every, progress)
            result, explanation, files = session.run()
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    except KeyboardInterrupt:
        if session is None or not session.saved:
            click.echo("Interrupted before the first step was done: nothing was saved.", err=True)
        else:
            where = ("" if seeds == SEEDS else f" --seeds {seeds}") + ("" if out == _OUT else f" --out {out}")
            click.echo(f"Interrupted after step {session.saved}. Continue with: mhc demo --resume{where}", err=True)
        sys.exit(130)
    if as_json:
        click.echo(files[0].read_text(), nl=False)
    else:
        print_summary(Console(), result, explanation, files)
