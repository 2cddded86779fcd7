"""Plan a graph until nobody rejects a site of the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mhc_compile.passes.planning.chains import Plan, plan_chains
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
from mhc_compile.passes.planning.match_residuals import Findings, find

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.provenance import Provenance
    from mhc_compile.passes.planning.verdict import Rejection


@dataclass(eq=False)
class Planner:
    """Plan one normalised graph, again without the sites that a caller rejects for reasons outside the graph.

    Sites are looked for once. Chains are linked again after each rejection, because the chain of a
    rejected site may end there, or run through the add that stays.

    Attributes:
        graph: the normalised graph.
        provenance: of its nodes.
        min_chain_length: chains of fewer sites are rejected.
        boundary: what is known of the other graphs of the model.
        rejected: rejections so far, by the add of the site.
    """

    graph: Graph
    provenance: Provenance
    min_chain_length: int = 2
    boundary: BoundaryInfo = field(default_factory=BoundaryInfo)
    rejected: dict[Node, Rejection] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._findings: Findings | None = None
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """The plan without the sites that were rejected so far."""
        if self._findings is None:
            self._findings = find(self.graph, self.provenance, self.boundary)
        if self._plan is None:
            self._plan = plan_chains(
                self.graph,
                self.provenance,
                min_chain_length=self.min_chain_length,
                reject=lambda site: self.rejected.get(site.add),
                edges=self.boundary,
                findings=self._findings,
            )
        return self._plan

    def settle(self, rejections: Callable[[Plan], Mapping[Node, Rejection]]) -> Plan:
        """Plan until `rejections` rejects no site of the plan.

        Args:
            rejections: the sites of a plan that cannot stay, by their adds. Each call sees a whole plan.

        Returns:
            The first plan that is accepted as it is.
        """
        while new := rejections(self.plan):
            self.rejected |= new
            self._plan = None
        return self.plan
