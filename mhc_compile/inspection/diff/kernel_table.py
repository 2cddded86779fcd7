"""Renders a `KernelDiff` for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from mhc_compile.inspection.diff.kernels import Kernel, KernelDiff, Phase

__all__ = ["render"]

_KINDS = {"fused": "fused by Inductor", "library": "products and library calls", "mhc": "hyper-connections"}


def render(diff: KernelDiff) -> RenderableType:
    """Counts, then every kernel whose number of launches changed, with what it holds."""
    parts: list[RenderableType] = [Text(f"{diff.model}: kernels of Inductor, plain → mhc", style="bold")]
    phases: tuple[Phase, ...] = ("forward", "backward")
    for phase in phases:
        if any(kernel.phase == phase for kernel in (*diff.before, *diff.after)):
            parts += [Text(), _counts(diff, phase), *_changed(diff, phase)]
    return Group(*parts)


def _counts(diff: KernelDiff, phase: Phase) -> Text:
    counts = diff.counts(phase)
    before, after = (sum(pair[side] for pair in counts.values()) for side in (0, 1))
    text = Text.assemble((phase, "cyan"), f": {before} → {after} launches")
    for kind, (old, new) in counts.items():
        if old or new:
            text.append(f"\n  {_KINDS[kind]}: {old} → {new}", style="dim" if old == new else "")
    return text


def _changed(diff: KernelDiff, phase: Phase) -> Iterator[Table]:
    sides = [[kernel for kernel in side if kernel.phase == phase] for side in (diff.before, diff.after)]
    before, after = (Counter(map(_key, side)) for side in sides)
    holds = {_key(kernel): kernel for side in sides for kernel in side}
    changed = [key for key in dict.fromkeys((*after, *before)) if before[key] != after[key]]
    if not changed:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("plain", justify="right")
    table.add_column("mhc", justify="right")
    table.add_column("kernel", overflow="fold", ratio=2)
    table.add_column("operations in it", overflow="fold", ratio=3)
    for key in changed:
        old, new = before[key], after[key]
        sign, style = ("+", "green") if not old else ("-", "red") if not new else ("~", "yellow")
        kernel = holds[key]
        held = ", ".join(operation.removeprefix("aten.") for operation in key[1])
        table.add_row(
            Text(sign, style=style), str(old), str(new), Text(_short(kernel), style=style), Text(held, style="dim")
        )
    yield table


def _key(kernel: Kernel) -> tuple[str, tuple[str, ...]]:
    return kernel.name, tuple(sorted(kernel.operations)) if kernel.kind == "fused" else ()


def _short(kernel: Kernel) -> str:
    """The name of a fused kernel lists its operations again, in alphabetical order."""
    return kernel.name.partition("_fused_")[0] + " kernel" if kernel.kind == "fused" else kernel.name
