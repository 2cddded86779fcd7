"""Plan a graph until nobody rejects a site of the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from mhc_compile.passes.planning.chains import plan_chains
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
from mhc_compile.passes.planning.match_residuals import Findings, find

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.provenance import Provenance
    from mhc_compile.passes.planning.plan import Plan
    from mhc_compile.passes.planning.verdict import Rejection


@dataclass(eq=False)
class Planner:
    """Plan one normalised graph without the sites that a caller rejects for outside reasons.

    Sites are looked for once. Chains are linked again after each rejection, because the chain of a
    rejected site may end there, or run through the add that stays.
    """

    graph: Graph
    provenance: Provenance
    min_chain_length: int = 2
    boundary: BoundaryInfo = field(default_factory=BoundaryInfo)
    #: Rejections so far, by the add of the site.
    rejected: dict[Node, Rejection] = field(default_factory=dict)
    _plan: Plan | None = field(default=None, init=False)

    @cached_property
    def _findings(self) -> Findings:
        return find(self.graph, self.provenance, self.boundary)

    @property
    def plan(self) -> Plan:
        """The plan without the sites that were rejected so far."""
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
        """Return the first plan without `rejections`: those of sites that cannot stay, by add."""
        while new := rejections(self.plan):
            self.reject(new)
        return self.plan

    def reject(self, rejections: Mapping[Node, Rejection]) -> None:
        """Plan without sites, by their adds."""
        self.rejected |= rejections
        self._plan = None

    def replace_plan(self, plan: Plan) -> None:
        """Use `plan` until a site is rejected."""
        self._plan = plan
