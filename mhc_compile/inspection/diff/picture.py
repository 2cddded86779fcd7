"""Content of the drawings of a `ModelDiff`: the trunk of each chain with its sites, folded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from mhc_compile.inspection.diff.fold import layers
from mhc_compile.inspection.diff.results import Change

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhc_compile.inspection.diff.fold import Section
    from mhc_compile.inspection.diff.results import GraphDiff, ModelDiff
    from mhc_compile.inspection.explain.results import ChainReport, SiteReport


@dataclass(frozen=True)
class Part:
    """A box on a trunk.

    "site": a site with its branch. "lifted": an operation that afterwards runs on all streams.
    "repeat": layers like an earlier one.
    """

    kind: Literal["site", "lifted", "repeat"]
    lines: tuple[str, ...]  #: the text of the box
    sites: int = 0  #: the number of sites that it stands for
    holds: int = 0  #: the number of sites of other chains inside the branch, which are not drawn
    path: str = ""  #: of a site


@dataclass(frozen=True)
class Trunk:
    """One chain of width C; its streams may arrive from another graph, or depart to one."""

    width: int
    parts: tuple[Part, ...]
    arrives: bool
    departs: bool

    def ends(self, streams: int, *, after: bool) -> tuple[str, str]:
        """Return the texts at both ends of the trunk, before or after the rewrite."""
        if not after:
            return f"trunk, C = {self.width}", "goes on in another graph" if self.departs else "end"
        start = f"{streams} streams arrive" if self.arrives else f"copies: 1 → {streams}"
        return start, f"{streams} streams go on" if self.departs else f"mean: {streams} → 1"


@dataclass(frozen=True)
class Picture:
    """One graph; a note for each reason for which additions are skipped."""

    title: str
    trunks: tuple[Trunk, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sketch:
    """All graphs of a model that have something to draw."""

    title: str
    description: str  #: the drawing in words, for screen readers
    streams: int
    pictures: tuple[Picture, ...]


def sketch(diff: ModelDiff) -> Sketch:
    """Return the content of the drawings of `diff`."""
    pieces = len(diff.graphs) > 1 or any(len(graph.modules) > 1 for graph in diff.graphs)
    pictures = tuple(one for graph in diff.graphs if (one := _picture(graph, pieces)).trunks or one.notes)
    trunks = [trunk for picture in pictures for trunk in picture.trunks]
    sites, streams = sum(part.sites for trunk in trunks for part in trunk.parts), diff.options.streams
    description = (
        f"Before: one line with an addition after each branch. After: {streams} parallel streams; at each of"
        f" {sites} sites in {len(trunks)} chain{'s' * (len(trunks) > 1)} the branch reads their sum weighted by"
        " pre, and its result returns to them weighted by post, while res mixes the streams."
    )
    title = f"{diff.model}: the residual trunk before and after"
    return Sketch(title, description if trunks else "Nothing is rewritten.", streams, pictures)


def _picture(graph: GraphDiff, pieces: bool) -> Picture:
    # The row of every site's add, or of the last node of the site.
    rows = {
        node.site: place
        for place, row in enumerate(graph.rows)
        for node in (row.before, row.after)
        if node is not None and node.op == "call" and node.site
    }
    holds: Counter[str] = Counter()
    outermost = []
    for chain in graph.chains:
        around = [site for other in graph.chains if other is not chain and (site := _around(other, chain, rows))]
        holds.update(site.path for site in around for _ in chain.sites)
        if not around:
            outermost.append(chain)
    homes = {row.node.site: layer for layer in layers(graph.rows) for row in layer.rows}
    drawn = [(chain, tuple(_folded(_parts(graph, chain, rows, holds), homes))) for chain in outermost]
    trunks = tuple(Trunk(chain.width, parts, chain.arrives, chain.departs and pieces) for chain, parts in drawn)
    reasons: dict[str, list[str]] = {}
    for rejection in graph.rejections:
        reasons.setdefault(rejection.reason, []).append(rejection.add)
    notes = (
        f"skipped: {len(adds)} × {reason} ({', '.join(adds[:2])}{', …' * (len(adds) > 2)})"
        for reason, adds in reasons.items()
    )
    return Picture(graph.title, trunks, tuple(notes))


def _around(outer: ChainReport, inner: ChainReport, rows: dict[str, int]) -> SiteReport | None:
    """Return the site of `outer` whose branch contains `inner`.

    `inner` is in a module below the site's, and ends before the site's add.
    """
    if any(site.path not in rows for site in (*outer.sites, *inner.sites)):
        return None
    start = -1
    for site in outer.sites:
        end = rows[site.path]
        above = f"{site.owner}." if site.owner else ""
        if all(start < rows[held.path] < end and held.owner and held.owner.startswith(above) for held in inner.sites):
            return site
        start = end
    return None


def _parts(
    graph: GraphDiff, chain: ChainReport, rows: dict[str, int], holds: Counter[str]
) -> Iterator[tuple[str, Part]]:
    """Yield the sites and the operations between them, with the path of this or the last site."""
    lifted = [(place, row.node) for place, row in enumerate(graph.rows) if row.change is Change.LIFTED]
    last, path = len(graph.rows), ""
    for site in chain.sites:
        place = rows.get(site.path, last)
        for at, node in lifted:
            if last < at < place:
                yield path, Part("lifted", (node.target.rpartition(".")[2] or node.target,))
        held = holds[site.path]
        lines = [".".join([*site.owner.split(".")[-2:], site.branch]).lstrip("."), site.owner_kind]
        lines += [f"{site.adds} additions in one"] * (site.adds > 1) + [f"holds {held} more sites"] * (held > 0)
        yield site.path, Part("site", tuple(lines), 1, held, site.path)
        last, path = place, site.path


def _folded(parts: Iterator[tuple[str, Part]], homes: dict[str, Section]) -> Iterator[Part]:
    """Yield the parts; successive layers like the same earlier one are a single part."""

    def like(item: tuple[str, Part]) -> str:
        return homes[item[0]].like if item[0] in homes else ""

    for earlier, items in groupby(parts, key=like):
        members = list(items)
        if earlier:
            count = len({id(homes[path]) for path, _ in members})
            yield Part("repeat", (f"× {count}: as {earlier}",), sum(part.sites for _, part in members))
        else:
            yield from (part for _, part in members)
