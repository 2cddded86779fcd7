"""The graphs that the rewrite goes through, from what the tracer captured to what the inner compiler gets.

| stage | graph |
| --- | --- |
| trace | as Dynamo or `torch.export` made it |
| capture | the same, with the regions of activation checkpointing opened |
| normalize | in the one spelling that sites are looked for in |
| plan | the same, with the verdict on every addition |
| expand | on streams |
| lower | as the inner compiler gets it: operators of neighbouring sites joined; of a program, in plain ATen |

Every pass is a stage too, by its name.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mhc_compile.errors import OptionError
from mhc_compile.inspection.diff.rows import align
from mhc_compile.inspection.diff.views import NodeView, view

if TYPE_CHECKING:
    from torch.fx import Graph

    from mhc_compile.passes import Pass, Plan
    from mhc_compile.passes.analysis.provenance import Provenance

__all__ = ["DEFAULT", "STAGES", "Stages", "choose"]

#: What has a name of its own, in order.
STAGES = ("trace", "capture", "normalize", "plan", "expand", "lower")
#: What a diff shows if nobody says otherwise.
DEFAULT = ("capture", "expand")


@dataclass
class Stages:
    """The graphs of one run of the passes, in order. Its `see` is a hook of `run_passes`.

    Args:
        provenance: of the graph.
        prefix: path of the module that the graph belongs to.
        plan: for the roles of its adds.
        foreseen: names of the parameters that are no graph inputs before the graph is expanded.
    """

    provenance: Provenance
    prefix: str
    plan: Plan
    foreseen: frozenset[str] = frozenset()
    _graphs: dict[str, tuple[NodeView, ...]] = field(default_factory=dict)
    _expanded: bool = False

    def put(self, name: str, graph: Graph) -> None:
        """Remembers `graph` under the name of a stage."""
        self._expanded |= name == "expand-streams"
        nodes = view(graph, self.provenance, self.plan, self.prefix)
        if not self._expanded:
            nodes = tuple(node for node in nodes if node.op != "parameter" or node.name not in self.foreseen)
        self._graphs[name] = nodes

    def see(self, step: Pass, before: Graph, after: Graph) -> None:  # noqa: ARG002 - a hook
        """Remembers what `step` made."""
        self.put(step.name, after)

    def alias(self, name: str) -> None:
        """Gives the latest stage a second name."""
        self._graphs[name] = self._graphs[self.names[-1]]

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were made."""
        return tuple(self._graphs)

    def pair(self, before: str, after: str) -> tuple[tuple[NodeView, ...], tuple[NodeView, ...]]:
        """Two stages. A diff that ends before the plan shows no verdicts, and the diff that ends with the plan shows them as what is new."""
        plan = self.names.index("plan")
        earlier, later = self._graphs[before], self._graphs[after]
        if self.names.index(after) < plan:
            later = _without_verdicts(later)
        if self.names.index(after) <= plan:
            return _without_verdicts(earlier), later
        return (_with_verdicts(earlier, self._graphs["plan"]) if self.names.index(before) < plan else earlier), later


def _without_verdicts(nodes: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
    return tuple(replace(node, role="", site="", reason="") if node.role != "stream" else node for node in nodes)


def _with_verdicts(nodes: tuple[NodeView, ...], plan: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
    """Nodes of an earlier stage, with the verdicts on what became of them: `y += x` is the site that `y = y + x` is."""
    twins = {
        row.before.name: row.after for row in align(nodes, plan) if row.before is not None and row.after is not None
    }

    def judged(node: NodeView) -> NodeView:
        twin = twins.get(node.name, node)
        return replace(node, role=twin.role, site=twin.site, reason=twin.reason) if not node.role else node

    return tuple(map(judged, nodes))


def choose(stage: str | None, known: tuple[str, ...]) -> tuple[str, str]:
    """The two stages that a diff compares.

    Args:
        stage: one, to be compared with its predecessor; two, as "capture..lower"; or None for the default.
        known: the stages that there are, in order.

    Raises:
        OptionError: no such stage.
    """
    if stage is None:
        return DEFAULT
    before, dots, after = stage.partition("..")
    names = [before, after] if dots else [stage]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"stage {name!r} is unknown; {hint}known stages: {', '.join(known)}; two of them as capture..lower"
            )
    if not dots:
        before, after = _predecessor(stage, known), stage
    if known.index(before) > known.index(after):
        raise OptionError(f"stage {before!r} does not come before {after!r}; the order is: {', '.join(known)}")
    return before, after


def _predecessor(stage: str, known: tuple[str, ...]) -> str:
    if stage == "lower" and "outline-regions" in known:  # with the regions closed again, as its own graph has them
        return "outline-regions"
    order = STAGES if stage in STAGES else known
    return order[max(0, order.index(stage) - 1)]
