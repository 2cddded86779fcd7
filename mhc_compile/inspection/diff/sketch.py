"""What a drawing of a `ModelDiff` shows: each chain's trunk with its sites on it, layers that are alike together.

chain ─> start, sites and trunk operations in order, end ─> the drawings, once with one line, once with n
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from mhc_compile.inspection.diff.fold import pattern
from mhc_compile.inspection.diff.rows import Change

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mhc_compile.inspection.diff.model_diff import GraphDiff, ModelDiff
    from mhc_compile.inspection.explain.results import ChainReport, SiteReport

__all__ = ["Lifted", "Note", "Part", "Picture", "Place", "Repeat", "Sketch", "Trunk", "sketch"]


@dataclass(frozen=True)
class Place:
    """A site: a branch, and the addition behind it that becomes a hyper-connection.

    Attributes:
        path: of the hyper-connection.
        label: the last parts of the branch's path: "h.0.attn".
        kind: class of the module that performs the addition.
        adds: how many additions the site is made of.
        holds: sites of other chains inside of the branch; they are not drawn.
    """

    path: str
    label: str
    kind: str
    adds: int = 1
    holds: int = 0


@dataclass(frozen=True)
class Lifted:
    """An operation on the trunk, which runs on all streams afterwards: "relu"."""

    label: str


@dataclass(frozen=True)
class Repeat:
    """Layers that look like an earlier one: how many, its path, and how many sites they have together."""

    count: int
    like: str
    sites: int


Part = Place | Lifted | Repeat


@dataclass(frozen=True)
class Trunk:
    """One chain.

    Attributes:
        width: C.
        parts: in the order in which the trunk meets them.
        arrives: its streams come from another graph.
        departs: they go on in another graph.
    """

    width: int
    parts: tuple[Part, ...]
    arrives: bool
    departs: bool

    @property
    def places(self) -> tuple[Place, ...]:
        """The sites that are drawn."""
        return tuple(part for part in self.parts if isinstance(part, Place))


@dataclass(frozen=True)
class Note:
    """Additions that are left alone for one reason: its code, and the names of the additions."""

    reason: str
    adds: tuple[str, ...]

    @property
    def text(self) -> str:
        """In one line: "left alone: 3 × broadcast (add, add_1, …)"."""
        names = ", ".join(self.adds[:2]) + (", …" if len(self.adds) > 2 else "")
        return f"left alone: {len(self.adds)} × {self.reason} ({names})"


@dataclass(frozen=True)
class Picture:
    """One graph: the modules that run it, its chains and its notes."""

    modules: tuple[str, ...]
    trunks: tuple[Trunk, ...]
    notes: tuple[Note, ...]

    @property
    def title(self) -> str:
        """The modules in a few words."""
        first = self.modules[0] or "the model itself"
        return first if len(self.modules) == 1 else f"{first} and {len(self.modules) - 1} more like it"


@dataclass(frozen=True)
class Sketch:
    """All graphs that have something to draw, of a model with so many streams."""

    model: str
    streams: int
    pictures: tuple[Picture, ...]

    @property
    def title(self) -> str:
        """What the drawing is of."""
        return f"{self.model}: the residual trunk before and after"

    @property
    def description(self) -> str:
        """The drawing in words, for those who cannot see it."""
        trunks = [trunk for picture in self.pictures for trunk in picture.trunks]
        if not trunks:
            return "Nothing is rewritten."
        sites = sum(
            1 if isinstance(part, Place) else part.sites
            for trunk in trunks
            for part in trunk.parts
            if not isinstance(part, Lifted)
        )
        return (
            f"Before: one line with an addition behind each branch. After: {self.streams} parallel streams; at each of {sites} sites in "
            f"{len(trunks)} chain{'s' * (len(trunks) > 1)} the branch reads their sum weighted by pre, and its result returns to them weighted by "
            "post, while res mixes the streams."
        )


def sketch(diff: ModelDiff) -> Sketch:
    """What there is to draw."""
    pieces = len(diff.graphs) > 1 or any(len(graph.modules) > 1 for graph in diff.graphs)
    pictures = (_picture(graph, pieces) for graph in diff.graphs)
    return Sketch(
        diff.model, diff.options.streams, tuple(picture for picture in pictures if picture.trunks or picture.notes)
    )


def _picture(graph: GraphDiff, pieces: bool) -> Picture:
    rows = _rows(graph)
    holds: Counter[str] = Counter()
    outermost = []
    for chain in graph.chains:
        around = [site for other in graph.chains if other is not chain and (site := _around(other, chain, rows))]
        holds.update(site.path for site in around for _ in chain.sites)
        if not around:
            outermost.append(chain)
    trunks = tuple(
        Trunk(chain.width, tuple(_folded(_parts(graph, chain, rows, holds))), chain.arrives, chain.departs and pieces)
        for chain in outermost
    )
    reasons: dict[str, list[str]] = {}
    for rejection in graph.rejections:
        reasons.setdefault(rejection.reason, []).append(rejection.add)
    return Picture(graph.modules, trunks, tuple(Note(reason, tuple(adds)) for reason, adds in reasons.items()))


def _rows(graph: GraphDiff) -> dict[str, int]:
    """The row of every site's addition, or of the last node of the site."""
    found: dict[str, int] = {}
    for place, row in enumerate(graph.rows):
        for node in (row.before, row.after):
            if node is not None and node.op == "call" and node.site:
                found[node.site] = place
    return found


def _around(outer: ChainReport, inner_backend: ChainReport, rows: dict[str, int]) -> SiteReport | None:
    """The site of `outer` whose branch holds `inner_backend`: it is in a module below the site's, and ends before the site's addition."""
    if any(site.path not in rows for site in (*outer.sites, *inner_backend.sites)):
        return None
    start = -1
    for site in outer.sites:
        end = rows[site.path]
        if all(start < rows[held.path] < end and _is_below(held.owner, site.owner) for held in inner_backend.sites):
            return site
        start = end
    return None


def _is_below(path: str, above: str) -> bool:
    return path != above and (not above or path.startswith(f"{above}."))


def _parts(
    graph: GraphDiff, chain: ChainReport, rows: dict[str, int], holds: Counter[str]
) -> Iterator[tuple[str, Part]]:
    """The sites and the operations between them, each with its layer."""
    lifted = [(place, row.node) for place, row in enumerate(graph.rows) if row.change is Change.LIFTED]
    last = -1
    for index, site in enumerate(chain.sites):
        place = rows.get(site.path, last)
        if index:
            for at, node in lifted:
                if last < at < place:
                    layer = _layer(chain.sites[index - 1].owner)
                    yield layer, Lifted(node.target.rpartition(".")[2] or node.target)
        label = ".".join([*site.owner.split(".")[-2:], site.branch]).lstrip(".")
        yield _layer(site.owner), Place(site.path, label, site.owner_kind, site.adds, holds[site.path])
        last = place


def _layer(path: str) -> str:
    """A module's path up to its last number; the whole path where there is none."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path


def _folded(parts: Iterator[tuple[str, Part]]) -> Iterator[Part]:
    """Layers that look like an earlier one of the same list of modules as one `Repeat`."""
    first: dict[tuple[object, ...], str] = {}
    waiting: Repeat | None = None
    for layer, members in groupby(parts, key=lambda item: item[0]):
        own = [part for _, part in members]
        signature = (pattern(layer), *(_shape(part, layer) for part in own))
        like = first.setdefault(signature, layer)
        if like == layer:
            if waiting is not None:
                yield waiting
                waiting = None
            yield from own
            continue
        sites = _sites(own)
        if waiting is not None and waiting.like == like:
            waiting = Repeat(waiting.count + 1, like, waiting.sites + sites)
            continue
        if waiting is not None:
            yield waiting
        waiting = Repeat(1, like, sites)
    if waiting is not None:
        yield waiting


def _sites(parts: Sequence[Part]) -> int:
    return sum(isinstance(part, Place) for part in parts)


def _shape(part: Part, layer: str) -> object:
    if isinstance(part, Place):
        return part.path.removeprefix(layer), part.kind, part.adds, part.holds
    return part
