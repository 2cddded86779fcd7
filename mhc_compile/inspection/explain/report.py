"""Renders an `Explanation` for the terminal. Repeated layers are collapsed: `h.0 … h.11` is one line."""

from __future__ import annotations

import os
import re
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.explain.explain import ChainReport, Explanation, RejectionReport, SiteReport

__all__ = ["render"]


def render(explanation: Explanation, *, every: bool = False) -> RenderableType:
    """The whole report: chains as trees of modules, rejections (one per reason, or `every` one), the cost and the expected overhead."""
    parts: list[RenderableType] = [_headline(explanation)]
    pieces = len(explanation.graphs) > 1
    parts += [_chain(chain, number, pieces) for number, chain in enumerate(explanation.chains, start=1)]
    if explanation.rejections:
        parts += [Text(), _rejections(explanation.rejections, every)]
    if explanation.sites:
        parts += [Text(), _cost(explanation)]
    if explanation.overheads:
        parts += [Text(), _overheads(explanation)]
    return Group(*parts)


def _headline(explanation: Explanation) -> Text:
    options = explanation.options
    text = Text()
    text.append(explanation.model, style="bold")
    text.append(
        f": {_count(len(explanation.sites), 'site')} in {_count(len(explanation.chains), 'chain')}", style="bold"
    )
    text.append(
        f", {_count(len(explanation.rejections), 'addition')} left alone, {_count(len(explanation.graphs), 'graph')}"
    )
    text.append(f"\n{_form(options)}", style="dim")
    for region, count in explanation.regions.items():
        text.append(f"\n{_count(count, 'region')} not looked into: {region}", style="yellow")
    if not explanation.sites:
        text.append("\nNothing would be rewritten.", style="yellow")
    return text


def _form(options: ResolvedOptions) -> str:
    """What the hyper-connections are like, in a line; what is as in the paper is not mentioned."""
    parts = [
        f"preset {options.preset}" if options.preset != "paper" else "",
        f"streams {options.streams}",
        f"mapping {options.mapping}"
        + (f" on {_count(len(options.overrides), 'pattern')} otherwise" if options.overrides else ""),
        "" if options.token_dependent else "static",
        f"gate of rank {options.rank}" if options.rank else "",
        "single pass" if options.single_pass else "",
        f"read-out {options.read_out}" if options.read_out != "mean" and not options.single_pass else "",
        f"start {options.init}",
    ]
    return ", ".join(filter(None, parts))


def _chain(chain: ChainReport, number: int, pieces: bool) -> Tree:
    """`pieces`: the model has several graphs, and chains may run through them."""
    lifted = f", runs on streams: {', '.join(sorted(set(chain.lifted)))}" if chain.lifted else ""
    arrives = ", streams from another graph" if pieces and chain.arrives else ""
    departs = ", on in another graph" if pieces and chain.departs else ""
    about = f"  {_count(len(chain.sites), 'site')}, width {chain.width}{lifted}{arrives}{departs}"
    tree = Tree(Text.assemble((f"chain {number}", "cyan"), about))
    for owners in _layers(chain.sites):
        first, last = owners[0][0], owners[-1][0]
        label = Text(first.owner or "(the model itself)", style="bold")
        if len(owners) > 1:
            label.append(f" … {last.owner}", style="bold")
            label.append(f"  ({len(owners)} × {first.owner_kind})", style="dim")
        else:
            label.append(f"  ({first.owner_kind})", style="dim")
        branch = tree.add(label)
        for site in owners[0]:
            adds = f" ({site.adds} adds)" if site.adds > 1 else ""
            where = f"  {_short(site.source)}" if site.source else ""
            branch.add(Text.assemble("x + ", (site.branch, "green"), f"(x){adds}", (where, "dim")))
    return tree


def _layers(sites: tuple[SiteReport, ...]) -> list[list[list[SiteReport]]]:
    """Sites by owner, and neighbouring owners that differ only in numbers together."""
    owners = [list(group) for _, group in groupby(sites, key=lambda site: site.owner)]

    def shape(owner: list[SiteReport]) -> tuple[str, str, tuple[str, ...]]:
        return re.sub(r"\d+", "#", owner[0].owner), owner[0].owner_kind, tuple(site.branch for site in owner)

    return [list(group) for _, group in groupby(owners, key=shape)]


def _rejections(rejections: tuple[RejectionReport, ...], every: bool) -> RenderableType:
    """A line for each reason and its sentence below it: a table would leave too little room for either in a narrow terminal."""
    ordered = sorted(rejections, key=lambda rejection: rejection.reason)
    groups = (
        [[rejection] for rejection in ordered]
        if every
        else [list(g) for _, g in groupby(ordered, key=lambda r: r.reason)]
    )
    lines: list[RenderableType] = [Text("Additions left alone", style="cyan")]
    for members in groups:
        first = members[0]
        count = f" × {len(members)}" if len(members) > 1 else ""
        where = "".join(f"  {place}" for place in (first.module, _short(first.source)) if place) or f"  {first.add}"
        lines.append(Text.assemble((f"{first.reason}{count}", "yellow"), (where, "dim")))
        lines.append(Padding(Text(first.message), (0, 0, 0, 4)))
    return Group(*lines)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="cyan", box=None, padding=(0, 1, 0, 0))


def _cost(explanation: Explanation) -> Table:
    cost, plain, added = explanation.cost, explanation.plain, explanation.added
    table = _table("Cost")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    share = f" ({cost.parameters / explanation.parameters:+.2%})" if explanation.parameters else ""
    table.add_row("parameters", f"{_si(cost.parameters)} beside {_si(explanation.parameters)}{share}")
    whole = (
        f"; {_si(added.flops)} beside {_si(plain.flops)} a pass ({added.flops / plain.flops:+.1%})"
        if plain is not None and plain.flops
        else ""
    )
    table.add_row("FLOPs", f"{_si(cost.flops)} per token, forward{whole}")
    table.add_row(
        "traffic",
        f"{_si(cost.bytes_lowered)}B per token, forward, estimated; {_si(cost.bytes_floor)}B is the floor,"
        f" {_si(cost.bytes_plain)}B the plain adds",
    )
    return table


def _overheads(explanation: Explanation) -> RenderableType:
    table = _table("Expected overhead of a step")
    table.add_column("", style="bold", no_wrap=True)
    for heading in ("these inputs", "many tokens", "at the floor"):
        table.add_column(heading, justify="right", header_style="dim")
    overheads = explanation.overheads
    for overhead in overheads:
        shares = (overhead.here, overhead.many_tokens, overhead.floor)
        table.add_row(overhead.machine.name, *(f"{share:+.1%}" for share in shares))
    note = (
        f"A roofline estimate in {overheads[0].machine.dtype}, forward and backward; nothing was measured. These inputs: their tokens share the"
        " reading of the weights. Many tokens: that reading does not count. At the floor: everything of a site in one kernel."
    )
    return Group(table, Text(note, style="dim"))


def _short(source: str) -> str:
    return os.path.basename(source)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def _si(value: float) -> str:
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {suffix}"
    return f"{value:.0f} "
