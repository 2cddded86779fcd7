"""Renders a `Story` for the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from mhc_compile.inspection.explain.story import Operation, RejectionStory, SiteStory, Story

__all__ = ["render"]


def render(story: Story) -> RenderableType:
    """Every add of the story: sites first, then what is left alone."""
    parts: list[RenderableType] = []
    for told in (*(_site(site) for site in story.sites), *(_rejection(rejection) for rejection in story.rejections)):
        parts += [Text(), told] if parts else [told]
    return Group(*parts)


class _Facts:
    """Names and what is known under them, one a row. Shapes are written in brackets, which rich would read as styles in a plain string."""

    def __init__(self) -> None:
        self.table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        self.table.add_column(style="dim", no_wrap=True)
        self.table.add_column(overflow="fold")

    def fact(self, name: str, text: str) -> None:
        """One row."""
        self.table.add_row(name, Text(text))


def _site(site: SiteStory) -> RenderableType:
    table = _Facts()
    _where(table, site.adds, site.code)
    table.fact("trunk", f"{_value(site.trunk)}: {site.trunk_from}")
    if site.shortcut:
        table.fact("shortcut", f"{_names(site.shortcut)} to the skip {_value(site.skip)}, on the streams")
    table.fact("features", f"{site.width} on axis {site.axis}, told by {site.axis_from}")
    table.fact("owner", f"{_module(site.owner)} ({site.owner_kind}): {site.owner_because}")
    table.fact("declaring_module", f"{_module(site.declaring_module)}: {site.carrier_because}")
    for title, weight in zip(("parameters", "", ""), site.parameters, strict=True):
        table.fact(title, f"{weight.path} {list(weight.shape)}")
    table.fact("chain", f"{site.chain}, site {site.index + 1} of {site.sites}")
    for title, path in (("before it", site.previous), ("behind it", site.following)):
        if path:
            table.fact(title, path)
    if site.lifted:
        table.fact("on streams", f"{_names(site.lifted)}, between the site before and this one")
    if site.stream is not None:
        table.fact("stream", f"{site.stream}: the branch leans to it at the start")
    parts: list[RenderableType] = [Text.assemble((site.path, "bold green"), " becomes a hyper-connection"), table.table]
    if site.branch:
        parts += [Text("branch, in order (* is a product)", style="cyan"), _operations(site.branch)]
    return Group(*parts)


def _rejection(rejection: RejectionStory) -> RenderableType:
    table = _Facts()
    _where(table, rejection.adds, rejection.code)
    table.fact("module", _module(rejection.module))
    table.fact("found", rejection.message)
    table.fact("it means", rejection.meaning)
    table.fact("met in", rejection.example)
    table.fact("to be done", rejection.remedy)
    if rejection.nearest:
        table.fact("nearest", rejection.nearest)
    title = Text.assemble((rejection.adds[-1].node, "bold yellow"), " is left alone: ", (rejection.reason, "yellow"))
    return Group(title, table.table, Text("terms", style="cyan"), _operations(rejection.terms))


def _where(table: _Facts, adds: tuple[Operation, ...], code: str) -> None:
    table.fact("add", _names(adds))
    if adds[-1].source:
        table.fact("line", os.path.basename(adds[-1].source))
    if code:
        table.fact("code", code)


def _operations(operations: Iterable[Operation]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(style="green", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for operation in operations:
        mark = "*" if operation.product else ""
        table.add_row(mark, operation.op, Text(operation.value), Text(operation.module))
    return table


def _names(operations: Iterable[Operation]) -> str:
    return ", ".join(
        operation.node if operation.node == operation.op else f"{operation.node} ({operation.op})"
        for operation in operations
    )


def _value(operation: Operation) -> str:
    return f"{operation.node} {operation.value}".strip()


def _module(path: str) -> str:
    return path or "the model itself"
