"""Tells the stories of a plan: every site and every rejection of one graph, from the nodes that the plan names."""

from __future__ import annotations

import linecache
import os
from typing import TYPE_CHECKING

from mhc_compile.capture.shared_graphs import below
from mhc_compile.inspection.explain.story import Operation, RejectionStory, SiteStory, Weight
from mhc_compile.modules.gated import create_connection
from mhc_compile.passes.analysis.feature_axis import entry_axis
from mhc_compile.passes.analysis.op_info import is_contraction, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import source_line
from mhc_compile.passes.analysis.sum_terms import describe, operands

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Graph, Node

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Chain, Plan, Rejection, Site
    from mhc_compile.passes.analysis.provenance import Provenance

__all__ = ["Teller"]


class Teller:
    """Stories of the verdicts on one graph, as `module` runs it.

    Args:
        graph: the normalised graph.
        plan: made on it.
        provenance: of it.
        options: of the backend.
        module: path of the graph's root below the model.
        number: how many blocks that run this graph come before `module`: their chains are taken as one, as the rewrite takes them.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        provenance: Provenance,
        options: ResolvedOptions,
        module: str = "",
        number: int = 0,
    ) -> None:
        self.plan, self.provenance, self.options = plan, provenance, options
        self.module, self.number = module, number
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.made_by = {site.add: site for site in plan.sites}

    def sites(self) -> list[tuple[Site, SiteStory]]:
        """All sites, chain by chain."""
        return [
            (site, self._site(chain, count, index))
            for count, chain in enumerate(self.plan.chains, start=1)
            for index, site in enumerate(chain.sites)
        ]

    def rejections(self) -> list[tuple[Rejection, RejectionStory]]:
        """All rejections, in graph order."""
        return [(rejection, self._rejection(rejection)) for rejection in self.plan.rejections]

    def _site(self, chain: Chain, count: int, index: int) -> SiteStory:
        site, options = chain.sites[index], self.options
        position = self.number * len(chain.sites) + index
        branch = sorted(site.branch, key=self.order.__getitem__)
        connection = create_connection(site.width, options.at(site.path), device="meta")
        path = below(self.module, site.path)
        return SiteStory(
            path=path,
            adds=self._operations(site.adds),
            code=_code(site.add),
            trunk=self._operation(site.trunk),
            trunk_from=self._origin(chain, index),
            skip=self._operation(site.skip),
            shortcut=self._operations(site.shortcut.nodes),
            branch=self._operations(branch),
            width=site.width,
            axis=site.axis,
            axis_from=_axis_from(site, branch),
            owner=below(self.module, site.owner.path),
            owner_kind=site.owner.kind,
            owner_because="the innermost module whose call holds both the add and the last product of the branch",
            declaring_module=below(self.module, site.declaring_module.path),
            carrier_because=_carrier_because(site),
            parameters=tuple(
                Weight(f"{path}.{name}", tuple(value.shape)) for name, value in connection.named_parameters()
            ),
            chain=count,
            index=index,
            sites=len(chain.sites),
            previous=below(self.module, chain.sites[index - 1].path) if index else "",
            following=below(self.module, chain.sites[index + 1].path) if index + 1 < len(chain.sites) else "",
            lifted=self._operations(chain.links[index].nodes),
            stream=position % options.streams if options.init == "preserve" else None,
        )

    def _origin(self, chain: Chain, index: int) -> str:
        site = chain.sites[index]
        if index:
            path = below(self.module, chain.sites[index - 1].path)
            return f"the sum of {path}" + (
                ", by operations that run on the streams" if chain.links[index].nodes else ""
            )
        if chain.arrives:
            return "streams that arrive from another graph"
        if site.trunk.op == "placeholder":
            return "an input of the graph"
        return f"'{op_name(site.trunk)}' in {self._module(site.trunk) or 'the model itself'}; the streams begin as copies of it"

    def _rejection(self, rejection: Rejection) -> RejectionStory:
        reason = rejection.reason
        return RejectionStory(
            adds=self._operations(rejection.adds),
            code=_code(rejection.add),
            module=below(self.module, rejection.module_path),
            terms=self._operations(operands(rejection.add)),
            reason=reason.value,
            message=rejection.message,
            meaning=reason.meaning,
            example=reason.example,
            remedy=reason.remedy,
            nearest=self._nearest(rejection),
        )

    def _nearest(self, rejection: Rejection) -> str:
        """The other verdict of the same module whose add is the fewest operations away."""
        told: dict[Node, str] = {}
        for other in self.plan.rejections:
            if other is not rejection and other.module_path == rejection.module_path:
                told[other.add] = f"'{other.add}' is left alone as well: {other.reason.value}"
        for site in self.plan.sites:
            if site.owner.path == rejection.module_path:
                told[site.add] = f"'{site.add}' is the site {below(self.module, site.path)}"
        if not told:
            return ""
        nearest = min(told, key=lambda add: abs(self.order[add] - self.order[rejection.add]))
        source = os.path.basename(source_line(nearest))
        return told[nearest] + (f" ({source})" if source else "")

    def _operations(self, nodes: Iterable[Node]) -> tuple[Operation, ...]:
        return tuple(self._operation(node) for node in nodes)

    def _operation(self, node: Node) -> Operation:
        value = tensor_value(node)
        return Operation(
            node=node.name,
            op=op_name(node) or node.op,
            value=describe(value) if value is not None else "",
            module=self._module(node),
            product=is_contraction(node),
            source=source_line(node),
        )

    def _module(self, node: Node) -> str:
        stack = self.provenance.stack(node)
        return below(self.module, stack[-1].path) if stack else self.module


def _axis_from(site: Site, branch: list[Node]) -> str:
    if site.tail:
        return "the graph in which the branch began"
    if entry_axis(site.trunk, branch) is not None:
        return "the first operation of the branch that normalises or contracts the trunk"
    return f"the way in which '{site.last_contraction}', the last product of the branch, leaves it"


def _carrier_because(site: Site) -> str:
    if site.tail:
        return "its call begins the branch, in another graph"
    if site.declaring_module.key == site.owner.key:
        return (
            "the owner does the last product with weights of its own, and its call shows the parameters to the tracer"
        )
    return f"it ends the branch ('{site.last_contraction}'), and its call shows the parameters to the tracer"


def _code(node: Node) -> str:
    """The line of the model's code that wrote `node`."""
    file, _, line = source_line(node).rpartition(":")
    return linecache.getline(file, int(line)).strip() if file and line.isdigit() else ""
