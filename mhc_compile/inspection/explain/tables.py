"""Renderers of `Explanation` and `AddExplanation` for a terminal."""

from __future__ import annotations

import os
import re
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from mhc_compile.inspection.explain.reach import NEEDED
from mhc_compile.inspection.explain.results import AddExplanation, Explanation, RejectionDetail, SiteDetail
from mhc_compile.reporting.base import counted, fact_table, render

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.explain.reach import Reach
    from mhc_compile.inspection.explain.results import ChainReport, Operation, RejectionReport, SiteReport


@render.register(Explanation)
def _explanation(result: Explanation, *, every: bool = False) -> Group:
    """Return the report, with one skipped addition per reason or with `every` one."""
    several = len(result.graphs) > 1
    parts: list[RenderableType] = [_headline(result)]
    parts += [_chain(chain, number, several) for number, chain in enumerate(result.chains, start=1)]
    if result.rejections:
        parts += [Text(), _rejections(result.rejections, every)]
    if result.sites:
        parts += [Text(), _cost(result)]
    if result.overheads:
        parts += [Text(), _overheads(result)]
    if result.training is not None:
        parts += [Text(), _training(result.training)]
    return Group(*parts)


def _headline(result: Explanation) -> Text:
    rewritten = f"{result.model}: {counted(len(result.sites), 'residual add')} rewritten"
    skipped = f", {counted(len(result.rejections), 'addition')} skipped\n"
    size = f"{counted(len(result.graphs), 'graph')}, {counted(len(result.chains), 'chain')}"
    warnings = [f"{counted(count, 'region')} not analyzed: {name}" for name, count in result.regions.items()]
    if not result.sites:
        warnings.append("Nothing would be rewritten.")
    options = (f"{size}; {_options(result.options)}", "dim")
    return Text.assemble((rewritten, "bold"), skipped, options, *((f"\n{line}", "yellow") for line in warnings))


def _options(options: ResolvedOptions) -> str:
    """Return the kind of the hyper-connections, without the paper's choices."""
    overrides = f" with {counted(len(options.overrides), 'override')}" if options.overrides else ""
    parts = [
        f"preset {options.preset}" if options.preset != "paper" else "",
        f"streams {options.streams}",
        f"mapping {options.mapping}{overrides}",
        "" if options.token_dependent else "static",
        f"gate of rank {options.rank}" if options.rank else "",
        "single pass" if options.single_pass else "",
        f"read-out {options.read_out}" if options.read_out != "mean" and not options.single_pass else "",
        f"init {options.init}",
    ]
    return ", ".join(part for part in parts if part)


def _chain(chain: ChainReport, number: int, several: bool) -> Tree:
    """Return a tree of modules, equal layers in one. `several`: the model has several graphs."""
    about = f": {counted(len(chain.sites), 'site')}, width {chain.width}"
    if chain.lifted:
        about += f", {' and '.join(sorted(set(chain.lifted)))} on all streams"
    if several and chain.arrives:
        about += ", streams from another graph"
    if several and chain.departs:
        about += ", continues in another graph"
    tree = Tree(Text.assemble((f"Chain {number}", "cyan"), about))
    for owners in _layers(chain.sites):
        first, last = owners[0][0], owners[-1][0]
        through, count = (f" … {last.owner}", f"{len(owners)} × ") if len(owners) > 1 else ("", "")
        name = first.owner or "(the model itself)"
        branch = tree.add(Text.assemble((f"{name}{through}", "bold"), (f"  ({count}{first.owner_kind})", "dim")))
        for site in owners[0]:
            adds = f" ({site.adds} adds)" if site.adds > 1 else ""
            where = f"  {os.path.basename(site.source)}" if site.source else ""
            branch.add(Text.assemble("x + ", (site.branch, "green"), f"(x){adds}", (where, "dim")))
    return tree


def _layers(sites: tuple[SiteReport, ...]) -> list[list[list[SiteReport]]]:
    """Group sites by owner, and consecutive owners that differ only in numbers."""
    owners = [list(group) for _, group in groupby(sites, key=lambda site: site.owner)]

    def shape(owner: list[SiteReport]) -> tuple[str, str, tuple[str, ...]]:
        return re.sub(r"\d+", "#", owner[0].owner), owner[0].owner_kind, tuple(site.branch for site in owner)

    return [list(group) for _, group in groupby(owners, key=shape)]


def _rejections(rejections: tuple[RejectionReport, ...], every: bool) -> Group:
    reason_of = attrgetter("reason")
    groups = groupby(sorted(rejections, key=reason_of), key=id if every else reason_of)
    hint = "--why NAME explains one" if every else "--all lists every one, --why NAME explains one"
    lines: list[RenderableType] = [Text.assemble(("Skipped additions", "cyan"), (f"  ({hint})", "dim"))]
    for _, (first, *others) in groups:
        reason = f"{first.reason} × {1 + len(others)}" if others else first.reason
        places = (first.module, os.path.basename(first.source))
        where = "  ".join(place for place in places if place) or first.add
        # A table would leave too little room for a place and a sentence in a narrow terminal.
        lines.append(Text.assemble((reason, "yellow"), (f"  {where}", "dim")))
        lines.append(Padding(Text(first.message), (0, 0, 0, 4)))
    return Group(*lines)


def _cost(result: Explanation) -> Group:
    cost, plain, added = result.cost, result.plain, result.added
    share = f" ({cost.parameters / result.parameters:+.2%})" if result.parameters else ""
    facts = [("Parameters", f"{_si(cost.parameters)} added to {_si(result.parameters)}{share}")]
    if plain is not None and plain.flops:
        share = f" ({added.flops / plain.flops:+.1%})"
        facts.append(("FLOPs", f"{_si(added.flops)} added to {_si(plain.flops)} per forward pass{share}"))
    facts += [
        ("FLOPs per token", f"{_si(cost.flops)} added per forward pass"),
        ("Bytes per token", f"{_si(cost.bytes_lowered)}B moved by the sites per forward pass (estimate)"),
        ("", f"{_si(cost.bytes_floor)}B at least, {_si(cost.bytes_plain)}B by the plain adds"),
    ]
    return Group(Text("Cost", style="cyan"), fact_table(facts))


def _overheads(result: Explanation) -> Group:
    headings = ("these inputs", "many tokens", "lower bound")
    columns = (Column(heading, justify="right", header_style="dim") for heading in headings)
    table = Table(Column(no_wrap=True), *columns, box=None, padding=(0, 1, 0, 0))
    for overhead in result.overheads:
        shares = (overhead.here, overhead.many_tokens, overhead.floor)
        table.add_row(overhead.machine.name, *(f"{share:+.1%}" for share in shares))
    notes = (
        f"A roofline estimate in {result.overheads[0].machine.dtype}; nothing was measured.",
        "these inputs: weights are read once for all tokens of the example inputs",
        "many tokens: so many that the time to read the weights is negligible",
        "lower bound: many tokens, and a site moves no more bytes than it must",
    )
    title = Text("Estimated overhead of a training step", style="cyan")
    return Group(title, table, Text("\n".join(notes), style="dim"))


def _training(reach: Reach) -> Group:
    facts = [
        ("Σ lr", f"{reach.total:.3g} at most: peak learning rate × steps"),
        ("Logits", f"can move by {reach.static:.2g} through bias and by {reach.token:.2g} through phi (AdamW)"),
    ]
    lines: list[RenderableType] = [Text("Gates in this training", style="cyan"), fact_table(facts)]
    if not reach.enough:
        text = (
            f"Less than {NEEDED:g} in all: the gates may stay near their start, and the model near the plain one. A larger"
            " init_gain or gate_speed, more steps or a higher learning rate moves them."
        )
        lines.append(Text(text, style="yellow"))
    return Group(*lines)


@render.register(AddExplanation)
def _add_explanation(result: AddExplanation) -> Group:
    """Return all sites, then all rejections."""
    parts: list[RenderableType] = []
    for part in (*map(_site, result.sites), *map(_rejection, result.rejections)):
        parts += [Text(), part] if parts else [part]
    return Group(*parts)


def _site(site: SiteDetail) -> Group:
    root = "the model itself"
    owner = "the innermost module whose call contains the addition and the last contraction of the branch"
    weights = [f"{path} {list(shape)}" for path, shape in site.parameters.items()]
    stream = f"{site.init_stream} has the largest weight in this branch at init"
    facts = [
        *_place(site),
        ("Trunk", f"{_value(site.trunk)}: {site.trunk_origin}"),
        ("Shortcut", f"{_names(site.shortcut)} on all streams gives {_value(site.skip)}" if site.shortcut else ""),
        ("Features", f"{site.width} on axis {site.axis}, from {site.axis_origin}"),
        ("Owner", f"{site.owner or root} ({site.owner_kind}): {owner}"),
        ("Declared by", f"a hook on {site.declaring_module or root}: {site.declaring_reason}"),
        ("Parameters", "\n".join(weights)),
        ("Chain", f"{site.chain}, site {site.index + 1} of {site.chain_length}"),
        ("Previous", site.previous),
        ("Next", site.next),
        ("Lifted", f"{_names(site.lifted)} on all streams, after the previous site" if site.lifted else ""),
        ("Stream", stream if site.init_stream is not None else ""),
    ]
    parts: list[RenderableType] = [Text.assemble((site.path, "bold green"), ": rewritten"), fact_table(facts)]
    if site.branch_operations:
        legend = "Branch, in order (* matrix product, convolution, attention or recurrence)"
        parts += [Text(legend, style="cyan"), _operations(site.branch_operations)]
    return Group(*parts)


def _rejection(rejection: RejectionDetail) -> Group:
    facts = [
        *_place(rejection),
        ("Module", rejection.module or "the model itself"),
        ("Finding", rejection.message),
        ("Meaning", rejection.meaning),
        ("Example", rejection.example),
        ("Fix", rejection.remedy),
        ("Nearest", rejection.nearest),
    ]
    title = Text.assemble((rejection.add, "bold yellow"), ": skipped (", (rejection.reason, "yellow"), ")")
    return Group(title, fact_table(facts), Text("Terms of the sum", style="cyan"), _operations(rejection.terms))


def _place(detail: SiteDetail | RejectionDetail) -> list[tuple[str, str]]:
    source = os.path.basename(detail.source)
    return [("Addition", _names(detail.add_operations)), ("Source", source), ("Code", detail.code)]


def _operations(operations: Iterable[Operation]) -> Table:
    columns = (Column(style=style, overflow="fold") for style in ("", "", "dim"))
    table = Table(Column(style="green", no_wrap=True), *columns, box=None, show_header=False, padding=(0, 1, 0, 0))
    for o in operations:
        table.add_row("*" if o.contraction else "", o.op, Text(o.value), Text(o.module))
    return table


def _names(operations: Iterable[Operation]) -> str:
    """Return the names of nodes, with the operation where the name does not say it."""
    return ", ".join(o.node if o.node == o.op else f"{o.node} ({o.op})" for o in operations)


def _value(operation: Operation) -> str:
    return f"{operation.node} {operation.value}".strip()


def _si(value: float) -> str:
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {suffix}"
    return f"{value:.0f} "
