"""`mhc convert CHECKPOINT OUT`: exchange checkpoints with systems that ship hyper-connections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mhc_compile.cli.error_handling import TargetError, near_files
from mhc_compile.cli.shared import Command, print_json, progress, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.interop.convert import Conversion

_SHOWN = 9


@click.command("convert", cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--from", "origin", metavar="PRESET", help="System of the checkpoint: deepseek-v4, glm5-next, hy-v4, qwen4-exp."
)
@click.option("--to", "into", metavar="PRESET", help="Convert a checkpoint with our hyper-connections for this system.")
@click.option(
    "--spelling",
    metavar="NAME",
    help="With --to: the names of the module in transformers, of files that it saved (saved), or of the original"
    " release (published).  [default: transformers]",
)
@click.option(
    "--branch",
    "branches",
    multiple=True,
    metavar="OURS=THEIRS",
    help="A branch's other name: attn=self_attn; repeatable.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--all", "every", is_flag=True, help="List every converted entry, not only the first ones.")
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
    """Convert CHECKPOINT to OUT: hyper-connections get other names and shapes, bit for bit.

    Every other entry is copied. CHECKPOINT is a .safetensors file (then OUT is one), or a folder
    with one, or with several and their index (then OUT is a folder). Tensors are read and written
    one at a time. OUT appears when it is complete.

    A checkpoint of another system is detected by names and shapes, and the error names the system
    that fits. Transposed residual logits are not detected: any numbers are valid logits. Nor is a
    gate_speed or scale_speed that was given with the preset, whose own are 1: `interop.to_native`
    of a state dict with its metadata takes them into account, and safetensors files have none.

    Exit codes: 0 done, 1 the checkpoint does not fit, or OUT exists; 2 wrong usage.
    """
    preset = origin or into
    if preset is None or (origin and into):
        raise click.UsageError("give either --from PRESET (into our layout) or --to PRESET (out of it)")
    if origin and spelling:
        raise click.UsageError("--spelling is for --to: with --from it is detected from the names of the checkpoint")
    pairs: dict[str, str] = {}
    for branch in branches:
        ours, _, theirs = branch.partition("=")
        if not (ours and theirs):
            raise click.UsageError(f"--branch {branch!r}: expected OURS=THEIRS, such as attn=self_attn")
        pairs[ours] = theirs
    if not checkpoint.exists():
        raise TargetError(f"there is no file or folder {str(checkpoint)!r}{near_files(str(checkpoint))}")
    from mhc_compile.interop.convert import convert

    native, names = into is not None, spelling or "transformers"
    with progress(f"converting {checkpoint}", quiet=quiet):
        result = convert(checkpoint, out, preset, native=native, spelling=names, branches=pairs, force=force)
    if as_json:
        print_json(result.to_dict())
    else:
        write(_report(result, every=every))


def _report(conversion: Conversion, *, every: bool) -> RenderableType:
    """Return paths, the first converted entries (or `every` one), counts, and other files."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    plan, changes = conversion.plan, list(conversion.plan.changes.values())
    direction = f"mhc to {plan.preset}" if plan.native else f"{plan.preset} to mhc"
    head = Text.assemble(
        (f"{direction} ({plan.spelling!r} names)", "bold"), f": {conversion.source} to {conversion.out}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    # Names are long: the new name goes below the old one, so that neither is folded.
    for column in ("entry", "shape", ""):
        table.add_column(column, overflow="fold")
    for change in changes if every else changes[:_SHOWN]:
        for source, shape in zip(change.sources, change.before, strict=True):
            table.add_row(source, str(list(shape)), "")
        table.add_row(f"  {change.target}", str(list(change.after)), Text(change.what, style="dim"))
    hidden = 0 if every else len(changes) - _SHOWN
    lines = [
        f"... and {hidden} more of the same kind (--all lists them)" if hidden > 0 else "",
        f"{len(changes)} entries converted, {len(plan.entries) - len(changes)} copied as they are;"
        f" {len(conversion.files)} files, {sum(conversion.files.values()):,} bytes",
        f"copied: {', '.join(conversion.copied)}" if conversion.copied else "",
        f"left out, folders: {', '.join(conversion.left)}" if conversion.left else "",
    ]
    return Group(head, Text(), table, *(Text(line) for line in lines if line))
