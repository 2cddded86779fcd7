"""Find the parameters of sites among the inputs of a Dynamo graph."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from mhc_compile.attachment.declaration import begun_by, declaring_paths
from mhc_compile.attachment.model_tree import connections, find_connection, split_path
from mhc_compile.compilation.bindings import PlannedSite, SiteParameters, bind_connection
from mhc_compile.modules.gated import create_connection
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.chain_rejections import reject_site
from mhc_compile.passes.planning.verdict import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.fx import Graph, Node

    from mhc_compile.capture.provenance import DynamoProvenance
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes import Plan, Rejection, Site
    from mhc_compile.passes.planning.plan import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding


class ModuleParameters(SiteParameters):
    """The graph inputs that Dynamo made of the parameters of attached hyper-connections."""

    def __init__(self, graph: Graph, provenance: DynamoProvenance) -> None:
        self.graph = graph
        self.provenance = provenance
        self.inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}

    def modules(self, site: Site) -> tuple[nn.Module, nn.Module]:
        """Return the owner of a site and its declaring module."""
        owner, declaring_module = self.provenance.module(site.owner), self.provenance.module(site.declaring_module)
        assert owner is not None, f"{site}: unknown module {site.owner}"
        assert declaring_module is not None, f"{site}: unknown module {site.declaring_module}"
        return owner, declaring_module

    def existing(self, planned: PlannedSite) -> HyperConnection | None:
        """Return the hyper-connection attached for the site."""
        return find_connection(self.modules(planned.site)[0], planned.site)

    def is_begun(self, planned: PlannedSite) -> bool:
        """Return whether the modules that start a split branch know its site; else True."""
        modules = [module for head in planned.site.heads for module in head.alive()]
        return not modules or begun_by(modules) == (planned.site.name, self.existing(planned))

    def find(self, planned: PlannedSite) -> Binding | None:
        """Return the graph inputs of a site, or None if its parameters are not in the graph."""
        connection = self.existing(planned)
        if connection is None:
            return None
        return _elsewhere(connection) if planned.site.tail else self._binding(connection)

    def bind(self, planned: PlannedSite) -> Binding:
        """Return the graph inputs of a site that was not rejected."""
        binding = self.find(planned)
        assert binding is not None
        return binding

    def undeclared(self, planned: tuple[PlannedSite, ...]) -> dict[Node, Rejection]:
        """Reject sites whose parameters did not enter the graph."""
        return {item.site.add: _not_declared(item.site) for item in planned if self.find(item) is None}

    def openings(self, plan: Plan) -> dict[BranchHead, tuple[str, Binding]]:
        """Return name and parameters of each branch that starts here and ends in another graph."""
        found: dict[BranchHead, tuple[str, Binding]] = {}
        for head in plan.heads:
            begun = self.begun(head)
            binding = self._binding(begun[1]) if begun is not None else None
            if begun is not None and binding is not None:
                found[head] = begun[0], binding
        return found

    def foresee(self, plan: Plan) -> dict[BranchHead, tuple[str, HyperConnection]]:
        """Return the sites of heads that no module knows, where the graph shows which they are.

        The module that declares the site is called here, without the add, and holds the last
        product with weights of the head.
        """
        root = self.provenance.root
        heads = [head for head in plan.heads if self.begun(head) is None]
        if root is None or not heads:
            return {}
        declared, taken = declaring_paths(root), {find_connection(self.modules(site)[0], site) for site in plan.sites}
        here = [
            (split_path(path)[1], connection)
            for path, connection in connections(root).items()
            if connection in declared and connection not in taken
            if self.provenance.target_of(connection.phi) is not None
        ]
        found = {}
        for head in heads if here else ():
            last = {self.provenance.module(ref) for ref in head.results.values() if ref is not None}
            sites = [
                (name, connection)
                for name, connection in here
                if any(last & set(root.get_submodule(path).modules()) for path in declared[connection])
            ]
            if len(sites) == 1:
                found[head] = sites[0]
        return found

    def begun(self, head: BranchHead) -> tuple[str, HyperConnection] | None:
        """Return name and hyper-connection of the site whose branch starts at `head`."""
        return begun_by([self.provenance.module(ref) for ref in head.modules])

    def _binding(self, connection: HyperConnection) -> Binding | None:
        def find(name: str) -> Node | None:
            target = self.provenance.target_of(attrgetter(name)(connection))
            return None if target is None else self.inputs[str(target)]

        return bind_connection(connection, find)


class PredictedParameters(ModuleParameters):
    """The parameters as `ModuleParameters` finds them after attaching. No module changes.

    Graph inputs are added as stand-ins for parameters that do not exist yet.
    """

    def __init__(self, graph: Graph, provenance: DynamoProvenance) -> None:
        super().__init__(graph, provenance)
        #: The stand-ins, by the path of the parameter.
        self.added: dict[str, Node] = {}
        self._predicted: dict[str, HyperConnection] = {}

    def bind(self, planned: PlannedSite) -> Binding:
        """Return the graph inputs of the site, or stand-ins."""
        site = planned.site
        connection = self.existing(planned)
        if connection is None or (planned.last and connection.lacks_end):
            connection = self._predicted.get(site.path)
            if connection is None:
                connection = create_connection(site.width, planned.options, last=planned.last, device="meta")
                self._predicted[site.path] = connection
        found = _elsewhere(connection) if site.tail else self._binding(connection)
        return found or self._stand_in(site.path, connection, planned.value, planned.dtype)

    def predicted_openings(
        self, plan: Plan, begun: Mapping[nn.Module, Sequence[PlannedSite]]
    ) -> dict[BranchHead, tuple[str, Binding]]:
        """Predict `openings`. `begun` maps a module to the sites whose branches it starts."""
        found = self.openings(plan)
        for head in plan.heads:
            sites = [
                begun.get(module, ()) for ref in head.modules if (module := self.provenance.module(ref)) is not None
            ]
            common = [site for site in sites[0] if all(site in more for more in sites[1:])] if sites else []
            value = tensor_value(head.value)
            if head not in found and len(common) == 1 and value is not None:
                site, options = common[0].site, common[0].options
                connection = create_connection(site.width, options, device="meta")
                found[head] = site.name, self._stand_in(site.path, connection, value, common[0].dtype)
        return found

    def forget(self) -> None:
        """Remove the stand-ins from the graph."""
        for node in self.added.values():
            self.graph.erase_node(node)
        self.added.clear()

    def _stand_in(self, site: str, connection: HyperConnection, like: torch.Tensor, dtype: torch.dtype) -> Binding:
        def stand_in(part: str) -> Node:
            path = f"{site}.{part}"
            if path not in self.added:
                last = next(node for node in reversed(self.graph.nodes) if node.op == "placeholder")
                with self.graph.inserting_after(last):
                    node = self.added[path] = self.graph.placeholder(path.replace(".", "_"))
                    # An argument name of the graph's code; a path may start with a digit.
                    node.target = node.name
                with like.fake_mode:  # type: ignore[attr-defined]
                    shape = connection.get_parameter(part).shape
                    node.meta["example_value"] = torch.empty(shape, dtype=dtype, device=like.device)
                self.provenance.name_parameter(node, path)
            return self.added[path]

        binding = bind_connection(connection, stand_in)
        assert binding is not None
        return binding


def _elsewhere(connection: HyperConnection) -> Binding:
    """Return a binding without inputs: the parameters enter the graph of the branch's head."""
    binding = bind_connection(connection, lambda name: "")  # noqa: ARG005
    assert binding is not None
    return binding


def _not_declared(site: Site) -> Rejection:
    caller = site.declaring_module.path or site.declaring_module.kind
    return reject_site(
        site, Reason.NOT_DECLARED, lambda: f"the call of {caller} did not declare {site.path} to the tracer"
    )
