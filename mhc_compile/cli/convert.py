"""`mhc convert CHECKPOINT OUT`: a checkpoint of a system that ships hyper-connections into ours, or ours into its."""

from __future__ import annotations

from pathlib import Path

import click

from mhc_compile.cli.shared import Command, print_json, progress, write

__all__ = ["command"]


@click.command("convert", cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "origin",
    metavar="PRESET",
    help="The checkpoint is of this system: deepseek-v4, glm5-next, hy-v4, qwen4-exp.",
)
@click.option(
    "--to",
    "into",
    metavar="PRESET",
    help="The checkpoint is of a model with our hyper-connections: write it for this system.",
)
@click.option(
    "--spelling",
    metavar="NAME",
    help="With --to: names as of the module in transformers, or as in files that it saved, or that were published.  [default: transformers]",
)
@click.option(
    "--branch",
    "branches",
    multiple=True,
    metavar="OURS=THEIRS",
    help="A branch of the model has another name than the system's: attn=self_attn; repeatable.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option("--all", "every", is_flag=True, help="List every entry that is converted, not only the first ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the report.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    checkpoint: Path,
    out: Path,
    origin: str | None,
    into: str | None,
    spelling: str | None,
    branches: tuple[str, ...],
    force: bool,
    every: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Rewrite CHECKPOINT to OUT: names and shapes of the parameters of hyper-connections change, bit for bit reversible, all else is copied.

    CHECKPOINT is a .safetensors file (OUT is one then), or a folder with one, or with several and their index (OUT is a folder then). Tensors are
    read and written one at a time. OUT appears when it is complete.

    Names and shapes tell whether a checkpoint is of the system named, and which other one it fits. They cannot tell residual logits that were
    written across the diagonal, because any numbers are valid logits.

    Exit codes: 0 done, 1 the checkpoint does not fit, or OUT is there; 2 wrong usage.
    """
    preset = origin or into
    if preset is None or (origin and into):
        raise click.UsageError("give either --from PRESET (into our layout) or --to PRESET (out of it)")
    if origin and spelling:
        raise click.UsageError("--spelling is for --to: with --from the names of the checkpoint tell it")
    pairs = dict(_pair(branch) for branch in branches)
    from mhc_compile.cli.error_handling import TargetError
    from mhc_compile.cli.targets.near import near_files

    if not checkpoint.exists():
        raise TargetError(f"there is no file or folder {str(checkpoint)!r}{near_files(str(checkpoint))}")
    from mhc_compile.interop.convert import convert
    from mhc_compile.interop.table import render

    with progress(f"converting {checkpoint}", quiet=quiet):
        result = convert(
            checkpoint,
            out,
            preset,
            native=into is not None,
            spelling=spelling or "transformers",
            branches=pairs,
            force=force,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        write(render(result, every=every))


def _pair(branch: str) -> tuple[str, str]:
    ours, found, theirs = branch.partition("=")
    if not (ours and found and theirs):
        raise click.UsageError(f"--branch {branch!r}: expected OURS=THEIRS, such as attn=self_attn")
    return ours, theirs
