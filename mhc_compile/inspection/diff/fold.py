"""Fold a long diff: rows by layer, and layers that change alike by reference to the first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from mhc_compile.inspection.diff.results import Change, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mhc_compile.inspection.diff.results import NodeView

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Section:
    """Consecutive rows of one layer, or between layers, without inputs and parameters.

    `path` is that of the layer ("transformer.h.0"), or common to rows that belong to none; `like`
    is that of an earlier layer that changes in the same way, or ""; `others` are those of the
    layers that follow and are like the same one.
    """

    path: str
    rows: tuple[Row, ...]
    like: str = ""
    others: tuple[str, ...] = ()

    @property
    def unchanged(self) -> bool:
        """Whether nothing changes in it, and it is like no earlier layer."""
        return not self.like and all(row.change is Change.SAME for row in self.rows)


@dataclass(frozen=True)
class NewParameters:
    """New parameters of `count` hyper-connections whose paths differ in numbers only.

    `path` is that of the first; `parts` are names and values: ("phi", "float32[256, 24]").
    """

    path: str
    count: int
    parts: tuple[tuple[str, str], ...]


def layers(rows: Sequence[Row]) -> tuple[Section, ...]:
    """Return the rows of the calls layer by layer; unchanged neighbours are one section."""
    found: list[Section] = []
    calls = [row for row in rows if row.node.op in {"call", "output"}]
    for unchanged, group in groupby(_sections(calls, 0), key=lambda section: section.unchanged):
        members = list(group)
        if unchanged:
            inside = (row for section in members for row in section.rows)
            members = [Section(_common([section.path for section in members]), tuple(inside))]
        found += members
    return tuple(found)


def sections(rows: Sequence[Row]) -> tuple[Section, ...]:
    """Return the layers; successive ones like the same earlier one are a single section."""
    found = []
    for _, group in groupby(layers(rows), key=lambda section: section.like or id(section)):
        first, *others = group
        found.append(replace(first, others=tuple(other.path for other in others)))
    return tuple(found)


def new_parameters(rows: Sequence[Row]) -> tuple[NewParameters, ...]:
    """Return the parameters among the rows that were added."""
    sites: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row.change is Change.ADDED and row.node.op == "parameter":
            path, _, part = row.node.name.rpartition(".")
            sites.setdefault(path, []).append((part, row.node.value))
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, parts in sites.items():
        alike.setdefault((_pattern(path), *parts), []).append(path)
    return tuple(NewParameters(paths[0], len(paths), key[1:]) for key, paths in alike.items())


def _sections(rows: Sequence[Row], depth: int) -> Iterator[Section]:
    first: dict[Any, str] = {}
    for layer, group in groupby(rows, key=lambda row: _layer(row, depth)):
        members = tuple(group)
        if not layer:
            yield Section(_common([row.node.module for row in members]), members)
            continue
        names = _Names(layer), _Names(layer)
        shapes = ((row.change, _shape(row.before, names[0]), _shape(row.after, names[1])) for row in members)
        signature = _pattern(layer), *shapes
        if signature in first:
            yield Section(layer, members, first[signature])
            continue
        first[signature] = layer
        changed = {_layer(row, depth + 1) for row in members if row.change is not Change.SAME} - {""}
        if len({_pattern(path) for path in changed}) < len(changed):  # it has layers of its own
            yield from _sections(members, depth + 1)
        else:
            yield Section(layer, members)


def _layer(row: Row, depth: int) -> str:
    """Return the module's path up to the number at `depth`, or "".

    Where streams begin and end belongs to no layer, so that the first and the last layer are alike
    but for that.
    """
    node = row.node
    if node.role == "stream" and not node.site:
        return ""
    numbers = list(_NUMBER.finditer(node.module))
    return node.module[: numbers[depth].end()] if depth < len(numbers) else ""


def _pattern(path: str) -> str:
    """Return a path with # for every number: "h.#.attn"."""
    return _NUMBER.sub("#", path)


def _common(paths: list[str]) -> str:
    """Return the path of the innermost module that contains all."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns))


@dataclass
class _Names:
    """Names of one side, spelled alike in every layer: by origin or by order of use."""

    layer: str
    inside: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> tuple[str, Any]:
        if name in self.inside:
            return "inside", self.inside[name]
        if name.startswith(f"{self.layer}."):
            return "own", name[len(self.layer) :]
        if _pattern(name) != name:
            return "other", _pattern(name)
        return "outside", self.outside.setdefault(name, len(self.outside))


def _shape(node: NodeView | None, names: _Names) -> Any:
    if node is None:
        return None
    reads = tuple(map(names.of, node.reads))
    names.inside[node.name] = len(names.inside)
    site = node.site[len(names.layer) :] if node.site.startswith(names.layer) else _pattern(node.site)
    return node.target, node.template, reads, node.value, node.module[len(names.layer) :], site, node.role, node.reason
