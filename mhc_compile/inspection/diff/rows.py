"""Two stages of one graph, side by side: which node became which, and what changed about it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.inspection.diff.views import NodeView

__all__ = ["Change", "Row", "align"]


#: Python's in-place operators, by what they compute.
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}


class Change(Enum):
    """What a stage did to a node. The value is the word that reports print."""

    #: Nothing.
    SAME = "same"
    #: Nothing, but the plan has a verdict about it: it becomes a site, or is left alone.
    MARKED = "marked"
    #: The same operation with other operands.
    REWIRED = "rewired"
    #: The same operation on streams: one axis more.
    LIFTED = "lifted"
    #: Another operation in its place: a residual add that became a hyper-connection.
    REPLACED = "replaced"
    #: Gone.
    REMOVED = "removed"
    #: New.
    ADDED = "added"


@dataclass(frozen=True)
class Row:
    """A node before and after; one of the two is None where it was added or removed."""

    change: Change
    before: NodeView | None
    after: NodeView | None

    @property
    def node(self) -> NodeView:
        """The node as it is now, or was."""
        node = self.after or self.before
        assert node is not None
        return node


def align(before: Sequence[NodeView], after: Sequence[NodeView]) -> tuple[Row, ...]:
    """The rows in the order of the graphs. A pair that changed places shows as removed and added."""
    pairs = _ordered(_pairs(before, after))
    rows: list[Row] = []
    i = j = 0
    for left, right in [*pairs, (len(before), len(after))]:
        rows += [Row(Change.REMOVED, node, None) for node in before[i:left]]
        rows += [Row(Change.ADDED, None, node) for node in after[j:right]]
        if left < len(before):
            rows.append(Row(_change(before[left], after[right]), before[left], after[right]))
        i, j = left + 1, right + 1
    return tuple(rows)


def _pairs(before: Sequence[NodeView], after: Sequence[NodeView]) -> list[tuple[int, int]]:
    """Nodes that are the same thing: by name and operation, then an add and the update of its site, then an operation that was lifted."""
    places = {node.name: place for place, node in enumerate(after)}
    pairs: dict[int, int] = {}
    for place, node in enumerate(before):
        other = places.get(node.name)
        if other is not None and after[other].target == node.target and after[other].op == node.op:
            pairs[place] = other
    free = set(range(len(after))) - set(pairs.values())
    updates = {after[place].site: place for place in sorted(free) if after[place].target.startswith("mhc.update")}
    lifted: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place in sorted(free - set(updates.values())):
        if after[place].role == "" or not after[place].target.startswith("mhc."):
            lifted[_trace(after[place])].append(place)
    for place, node in enumerate(before):
        if place in pairs or node.op != "call":
            continue
        if node.role == "site" and node.site in updates and _is_last_add(node, before[place + 1 :]):
            pairs[place] = updates.pop(node.site)
        elif lifted[_trace(node)]:
            pairs[place] = lifted[_trace(node)].pop(0)
    return sorted(pairs.items())


def _is_last_add(node: NodeView, following: Sequence[NodeView]) -> bool:
    return not any(other.role == "site" and other.site == node.site for other in following)


def _trace(node: NodeView) -> tuple[str, str, str]:
    name = node.target.rpartition(".")[2].rstrip("_")
    return node.module, node.source, _IN_PLACE.get(name, name)


def _ordered(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest selection of pairs that is in order on both sides. `pairs` is sorted by the left."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, right) in enumerate(pairs):
        length = bisect_left(tails, right)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [right]
        ends[length : length + 1] = [index]
    chosen = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chosen.append(pairs[index])
        index = previous[index]
    return chosen[::-1]


def _change(before: NodeView, after: NodeView) -> Change:
    if before.target.rpartition(".")[2] != after.target.rpartition(".")[2]:
        return Change.REPLACED
    if before.value != after.value and before.role != "stream":
        return Change.LIFTED
    if (before.template, before.reads, before.value) != (after.template, after.reads, after.value):
        return Change.REWIRED
    return (
        Change.MARKED
        if (before.role, before.site, before.reason) != (after.role, after.site, after.reason)
        else Change.SAME
    )
