"""Makes a long diff short: rows by module, layers that are changed in the same way together."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mhc_compile.inspection.diff.rows import Change, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mhc_compile.inspection.diff.views import NodeView

__all__ = ["NewParameters", "Section", "common", "layers", "new_parameters", "pattern", "sections"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Section:
    """Consecutive rows of one layer, or of what lies between layers.

    Attributes:
        path: of the layer ("transformer.h.0"); what all rows have in common, where they belong to no layer.
        rows: in order, without inputs and parameters.
        like: path of an earlier layer that is changed in the very same way, or "".
        others: paths of the layers that follow and are like the same one.
    """

    path: str
    rows: tuple[Row, ...]
    like: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewParameters:
    """Parameters of hyper-connections that became inputs of the graph; those whose paths differ in numbers alone together.

    Attributes:
        path: of the first hyper-connection.
        count: of hyper-connections.
        parts: name and value of each parameter: ("phi", "float32[256, 24]").
    """

    path: str
    count: int
    parts: tuple[tuple[str, str], ...]


def pattern(path: str) -> str:
    """A path with # for every number: "h.#.attn"."""
    return _NUMBER.sub("#", path)


def sections(rows: Sequence[Row]) -> tuple[Section, ...]:
    """The rows, layer by layer. Of layers that are changed in the same way the first is given whole, the others by name and `like`."""
    return tuple(_merged(iter(layers(rows))))


def layers(rows: Sequence[Row]) -> tuple[Section, ...]:
    """The rows, layer by layer, each layer whole: together they are all rows but inputs and parameters, in order."""
    return tuple(_sections([row for row in rows if row.node.op in {"call", "output"}], 0))


def new_parameters(rows: Sequence[Row]) -> tuple[NewParameters, ...]:
    """The parameters among the rows that were added."""
    sites: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row.change is Change.ADDED and row.node.op == "parameter":
            path, _, part = row.node.name.rpartition(".")
            sites.setdefault(path, []).append((part, row.node.value))
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, parts in sites.items():
        alike.setdefault((pattern(path), *parts), []).append(path)
    return tuple(NewParameters(paths[0], len(paths), key[1:]) for key, paths in alike.items())


def _sections(rows: Sequence[Row], depth: int) -> Iterator[Section]:
    runs = [(layer, tuple(members)) for layer, members in groupby(rows, key=lambda row: _layer(row, depth))]
    first: dict[Any, str] = {}
    for layer, members in runs:
        if not layer:
            yield Section(common([row.node.module for row in members]), members)
            continue
        signature = _signature(layer, members)
        if signature in first:
            yield Section(layer, members, like=first[signature])
            continue
        first[signature] = layer
        changed = {_layer(row, depth + 1) for row in members if row.change is not Change.SAME} - {""}
        if len({pattern(path) for path in changed}) < len(changed):  # it has layers of its own
            yield from _sections(members, depth + 1)
        else:
            yield Section(layer, members)


def _merged(found: Iterator[Section]) -> Iterator[Section]:
    waiting: Section | None = None
    for section in found:
        if waiting is not None and waiting.like and section.like == waiting.like:
            waiting = Section(waiting.path, waiting.rows, waiting.like, (*waiting.others, section.path))
            continue
        if waiting is not None and _unchanged(waiting) and _unchanged(section):
            waiting = Section(common([waiting.path, section.path]), (*waiting.rows, *section.rows))
            continue
        if waiting is not None:
            yield waiting
        waiting = section
    if waiting is not None:
        yield waiting


def _unchanged(section: Section) -> bool:
    return not section.like and all(row.change is Change.SAME for row in section.rows)


def _layer(row: Row, depth: int) -> str:
    """The module's path up to its first number, or the one at `depth`; "" if there is none.

    Where streams begin and end belongs to no layer: the first and the last layer are like the others but for that.
    """
    node = row.node
    if node.role == "stream" and not node.site:
        return ""
    numbers = list(_NUMBER.finditer(node.module))
    return node.module[: numbers[depth].end()] if depth < len(numbers) else ""


def common(paths: list[str]) -> str:
    """The path of the innermost module that has all of them below it."""
    parts = [path.split(".") for path in paths]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


@dataclass
class _Names:
    """Says the names of one side in a way that is the same in every layer: where they are made, or in which order they come in."""

    layer: str
    inside: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def of(self, name: str) -> tuple[str, Any]:
        if name in self.inside:
            return "inside", self.inside[name]
        if name.startswith(f"{self.layer}."):
            return "own", name[len(self.layer) :]
        if pattern(name) != name:
            return "other", pattern(name)
        return "outside", self.outside.setdefault(name, len(self.outside))


def _signature(layer: str, rows: Sequence[Row]) -> Any:
    before, after = _Names(layer), _Names(layer)
    return pattern(layer), tuple((row.change, _shape(row.before, before), _shape(row.after, after)) for row in rows)


def _shape(node: NodeView | None, names: _Names) -> Any:
    if node is None:
        return None
    reads = tuple(map(names.of, node.reads))
    names.inside[node.name] = len(names.inside)
    place = (
        node.module[len(names.layer) :],
        node.site[len(names.layer) :] if node.site.startswith(names.layer) else pattern(node.site),
    )
    return node.target, node.template, reads, node.value, place, node.role, node.reason
