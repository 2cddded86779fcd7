"""`mhc_compile.why`: single additions in full, found by name in the plan of the rewrite."""

from __future__ import annotations

import difflib
import linecache
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.shared_graphs import below
from mhc_compile.config.options import Options
from mhc_compile.errors import UnknownAddError
from mhc_compile.inspection.explain.explain import plan_graphs, rejection_report, site_report
from mhc_compile.inspection.explain.results import AddExplanation, Operation, RejectionDetail, SiteDetail
from mhc_compile.modules.gated import create_connection
from mhc_compile.passes.analysis.feature_axis import entry_axis
from mhc_compile.passes.analysis.op_info import is_contraction, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import source_line
from mhc_compile.passes.analysis.sum_terms import describe, operands

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Chain, Plan, Rejection, Site
    from mhc_compile.passes.analysis.provenance import Provenance


def why(
    model: nn.Module | ExportedProgram,
    *args: Any,
    node: str,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> AddExplanation:
    """Explain why one addition, or several that share a name, is rewritten or skipped.

    The model is traced, not run, and not changed.

    Args:
        model: as for `explain`.
        *args: example inputs, as for `model(*args, **kwargs)`; none for a program.
        node: one of
            - the name of an operation ("add_3"); an operation of a branch stands for its site;
            - the path of a site ("h.0.mhc.attn");
            - the path of a module: all additions in it ("h.0"), or, if it performs none and ends
              a branch ("h.0.attn"), the site of that branch;
            - "file.py:12".
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Raises:
        UnknownAddError: nothing has that name.
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs.
    """
    parsed = Options.parse(options)
    details: list[SiteDetail | RejectionDetail] = []

    def on_graph(_: GraphModule, graph: Graph, plan: Plan, provenance: Provenance, modules: tuple[str, ...]) -> None:
        for block, module in enumerate(modules):
            builder = _DetailBuilder(graph, plan, provenance, parsed, module, block)
            details.extend((*builder.sites(), *builder.rejections()))

    plan_graphs(model, args, kwargs, parsed, on_graph)
    found = [detail for detail in details if _is_called(detail, node)]
    if not found:
        sites = (detail for detail in details if isinstance(detail, SiteDetail))
        found = [site for site in sites if node in (site.declaring_module, *(o.node for o in site.branch_operations))]
    if not found:
        raise _unknown(node, details)
    return AddExplanation(
        node,
        tuple(detail for detail in found if isinstance(detail, SiteDetail)),
        tuple(detail for detail in found if isinstance(detail, RejectionDetail)),
    )


def _is_called(detail: SiteDetail | RejectionDetail, name: str) -> bool:
    """Return whether `name` stands for the addition: its module or line, or itself."""
    module = detail.owner if isinstance(detail, SiteDetail) else detail.module
    place = f"/{name.removeprefix('./')}"
    is_line = any(add.source and f"/{add.source}".endswith(place) for add in detail.add_operations)
    return bool(name) and (is_line or name in _names(detail) or module.startswith(f"{name}."))


def _names(detail: SiteDetail | RejectionDetail) -> list[str]:
    """Return the names of an addition, without those of the modules around its own."""
    nodes = [add.node for add in detail.add_operations]
    own = [detail.path, *nodes, detail.owner] if isinstance(detail, SiteDetail) else [*nodes, detail.module]
    return [name for name in (*own, *(os.path.basename(add.source) for add in detail.add_operations)) if name]


def _unknown(name: str, details: list[SiteDetail | RejectionDetail]) -> UnknownAddError:
    names = list(dict.fromkeys(known for detail in details for known in _names(detail)))
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or names[:5]
    hint = f"near names: {', '.join(near)}" if near else "the model has no addition of floating-point tensors"
    return UnknownAddError(
        f"no addition is called {name!r}, and no module or line of that name performs one; {hint}."
        " Expected the name of an operation, the path of a site or of a module, or file.py:LINE;"
        " `mhc explain --all` lists them"
    )


@dataclass(frozen=True)
class _DetailBuilder:
    """Details of the verdicts on one normalized graph, as the module at the path `module` runs it.

    `block` is the number of equal blocks that run this graph before. The rewrite numbers the sites
    of all of them as one chain.
    """

    graph: Graph
    plan: Plan
    provenance: Provenance
    options: ResolvedOptions
    module: str
    block: int

    @cached_property
    def order(self) -> dict[Node, int]:
        """The position of every node in the graph."""
        return {node: position for position, node in enumerate(self.graph.nodes)}

    def sites(self) -> Iterator[SiteDetail]:
        """Yield all sites, chain by chain."""
        for number, chain in enumerate(self.plan.chains, start=1):
            yield from (self._site(chain, number, index) for index in range(len(chain.sites)))

    def rejections(self) -> Iterator[RejectionDetail]:
        """Yield all rejections, in graph order."""
        for rejection in self.plan.rejections:
            reason = rejection.reason
            yield RejectionDetail(
                **vars(rejection_report(rejection, self.module)),
                add_operations=self._operations(rejection.adds),
                code=_code(rejection.add),
                terms=self._operations(operands(rejection.add)),
                meaning=reason.meaning,
                example=reason.example,
                remedy=reason.remedy,
                nearest=self._nearest(rejection),
            )

    def _site(self, chain: Chain, number: int, index: int) -> SiteDetail:
        site, options = chain.sites[index], self.options
        report = site_report(site, index, self.module)
        position = self.block * len(chain.sites) + index
        branch = sorted(site.branch, key=self.order.__getitem__)
        connection = create_connection(site.width, options.at(site.path), device="meta")
        paths = ["", *(below(self.module, each.path) for each in chain.sites), ""]
        return SiteDetail(
            **vars(report),
            add_operations=self._operations(site.adds),
            code=_code(site.add),
            trunk=self._operation(site.trunk),
            trunk_origin=self._trunk_origin(chain, index),
            skip=self._operation(site.skip),
            shortcut=self._operations(site.shortcut.nodes),
            branch_operations=self._operations(branch),
            axis=site.axis,
            axis_origin=_axis_origin(site, branch),
            declaring_module=below(self.module, site.declaring_module.path),
            declaring_reason=_declaring_reason(site),
            parameters={f"{report.path}.{name}": tuple(value.shape) for name, value in connection.named_parameters()},
            chain=number,
            chain_length=len(chain.sites),
            previous=paths[index],
            next=paths[index + 2],
            lifted=self._operations(chain.links[index].nodes),
            init_stream=position % options.streams if options.init == "preserve" else None,
        )

    def _trunk_origin(self, chain: Chain, index: int) -> str:
        site = chain.sites[index]
        if index:
            lifted = ", after operations that run on all streams" if chain.links[index].nodes else ""
            return f"the sum of {below(self.module, chain.sites[index - 1].path)}{lifted}"
        if chain.arrives:
            return "streams from another graph"
        if site.trunk.op == "placeholder":
            return "an input of the graph"
        where = self._module(site.trunk) or "the model itself"
        return f"'{op_name(site.trunk)}' in {where}; the streams start as copies of it"

    def _nearest(self, rejection: Rejection) -> str:
        """Return the verdict of the same module whose add is the fewest operations away."""
        verdicts: dict[Node, str] = {
            other.add: f"'{other.add}' is skipped too: {other.reason.value}"
            for other in self.plan.rejections
            if other is not rejection and other.module_path == rejection.module_path
        }
        for site in self.plan.sites:
            if site.owner.path == rejection.module_path:
                verdicts[site.add] = f"'{site.add}' is the site {below(self.module, site.path)}"
        if not verdicts:
            return ""
        nearest = min(verdicts, key=lambda add: abs(self.order[add] - self.order[rejection.add]))
        source = os.path.basename(source_line(nearest))
        return verdicts[nearest] + (f" ({source})" if source else "")

    def _operations(self, nodes: Iterable[Node]) -> tuple[Operation, ...]:
        return tuple(self._operation(node) for node in nodes)

    def _operation(self, node: Node) -> Operation:
        value = tensor_value(node)
        return Operation(
            node=node.name,
            op=op_name(node) or node.op,
            value=describe(value) if value is not None else "",
            module=self._module(node),
            contraction=is_contraction(node),
            source=source_line(node),
        )

    def _module(self, node: Node) -> str:
        stack = self.provenance.stack(node)
        return below(self.module, stack[-1].path) if stack else self.module


def _axis_origin(site: Site, branch: list[Node]) -> str:
    if site.tail:
        return "the graph in which the branch begins"
    if entry_axis(site.trunk, branch) is not None:
        return "the first operation of the branch that normalizes or contracts the trunk"
    return f"the result of '{site.last_contraction}', the last contraction of the branch"


def _declaring_reason(site: Site) -> str:
    if site.tail:
        return "its call begins the branch, in another graph"
    if site.declaring_module.key == site.owner.key:
        return "the owner performs the last contraction of the branch with its own weights"
    return f"its call ends the branch, with '{site.last_contraction}'"


def _code(node: Node) -> str:
    """Return the line of the model's code that made `node`."""
    file, _, line = source_line(node).rpartition(":")
    return linecache.getline(file, int(line)).strip() if file and line.isdigit() else ""
