"""FX graphs as `NodeView`s: plain data with readable names, which keeps no model alive."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mhc_compile.inspection.diff.results import NodeView
from mhc_compile.passes.analysis.op_info import example_value, leaf_module
from mhc_compile.passes.analysis.provenance import source_line
from mhc_compile.passes.planning.graph_boundary import ARRIVAL, BranchInput

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from mhc_compile.inspection.diff.results import Operation, Role
    from mhc_compile.passes import Plan
    from mhc_compile.passes.analysis.provenance import Provenance

#: Prefix of the nodes that the rewrite writes.
_OURS = "mhc_"


class Viewer:
    """Makes `NodeView`s of the nodes of a graph with example values, as every stage leaves it.

    Provenance and plan may be those of the graph that it was made from. `prefix` is the path of the
    module that the graph belongs to.
    """

    def __init__(self, provenance: Provenance, plan: Plan, prefix: str) -> None:
        self.provenance, self.prefix = provenance, prefix
        self.names: dict[Node, str] = {}
        self.taken: set[str] = set()
        #: The hyper-connection of each node of the rewrite.
        self.sites: dict[Node, str] = {}
        #: By name, which passes keep when they copy a graph.
        self.verdicts: dict[str, tuple[Role, str, str]] = {
            rejection.add.name: ("skipped", "", rejection.reason.value) for rejection in plan.rejections
        }
        #: Hyper-connections of branches that begin in other graphs, by name below their owner.
        self.tails: dict[str, set[str]] = defaultdict(set)
        for site in plan.sites:
            path = self._below(site.path)
            self.verdicts.update({add.name: ("site", path, "") for add in site.adds})
            if site.tail:
                self.tails[site.name].add(path)

    def graph(self, graph: Graph, inside: str = "") -> Iterator[NodeView]:
        """Yield the nodes of `graph`; the body of a region precedes its call, `inside` its name."""
        for node in graph.nodes:
            body = _attribute(node)
            if isinstance(body, fx.GraphModule):
                yield from self.graph(body.graph, f"{node.target}.")
            yield self.node(node, inside)

    def node(self, node: Node, inside: str) -> NodeView:
        """Return the view of one node; its operands must have been viewed before."""
        name = self.names[node] = self._unique(inside + self._name(node))
        template, reads = _template(node)
        stack = [ref for ref in self.provenance.stack(node) if ref.path] if node.op != "placeholder" else []
        role, site, reason = self.verdicts.get(node.name, self._ours(node))
        op: Operation = "output" if node.op == "output" else "call"
        if node.op in {"placeholder", "get_attr"}:
            op = "parameter" if self._parameter(node) else "input"
        return NodeView(
            name=name,
            op=op,
            target=_target(node),
            template=template,
            reads=tuple(self.names[operand] for operand in reads),
            value=_value(example_value(node)),
            module=self._below(stack[-1].path) if stack else self.prefix,
            kind=stack[-1].kind if stack else "",
            source=source_line(node),
            role=role,
            site=site,
            reason=reason,
        )

    def _ours(self, node: Node) -> tuple[Role, str, str]:
        """Return role and site of a node of the rewrite, by its parameters or coefficients."""
        path = self._parameter(node).rpartition(".")[0]
        if ".mhc." in f".{path}.":
            self.sites[node] = self._below(path)
            return "stream", self.sites[node], ""
        closing = node.meta.get(ARRIVAL)
        if isinstance(closing, BranchInput) and len(self.tails[closing.name]) == 1:
            (self.sites[node],) = self.tails[closing.name]
        if not node.name.startswith(_OURS):
            return "", "", ""
        update = torch.ops.mhc.update.default
        given = [*node.all_input_nodes, *(user.args[2] for user in node.users if user.target is update)]
        # A reader of an update belongs to the next site.
        known = (one for one in given if isinstance(one, fx.Node) and one.target is not update)
        sites = [self.sites[one] for one in known if one in self.sites]
        if sites:
            self.sites[node] = sites[-1]
        return "stream", self.sites.get(node, ""), ""

    def _parameter(self, node: Node) -> str:
        if node.op == "get_attr":
            return str(node.target)
        return (self.provenance.parameter_name(node) or "") if node.op == "placeholder" else ""

    def _name(self, node: Node) -> str:
        path = self._parameter(node)
        if path:
            return self._below(path)
        if node.op == "placeholder":
            return re.sub(r"^l_(?:self_)?(?:(?:args|kwargs)_)?|_$", "", node.name) or node.name
        return node.name

    def _unique(self, name: str) -> str:
        fresh, number = name, 1
        while fresh in self.taken:
            number += 1
            fresh = f"{name}#{number}"
        self.taken.add(fresh)
        return fresh

    def _below(self, path: str) -> str:
        return ".".join(part for part in (self.prefix, path) if part)


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return type(leaf_module(node)).__name__
    if node.op not in {"call_function", "call_method"}:
        return ""
    target: Any = node.target
    if hasattr(target, "overloadpacket") or hasattr(target, "overloads"):  # an operator of a library
        return str(target).removesuffix(".default")
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__name__", str(target))
    if module in {"_operator", "operator"}:
        return name
    if hasattr(torch.nn.functional, name) and module.startswith("torch"):
        return f"F.{name}"
    if module.startswith(("torch", "_VariableFunctions")) or not module:
        return f"torch.{name}"
    return f"{module.rpartition('.')[2]}.{name}"


def _template(node: Node) -> tuple[str, list[Node]]:
    reads: list[Node] = []

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            reads.append(value)
            return "{}"
        if isinstance(value, tuple):
            return f"({', '.join(map(text, value))}{',' * (len(value) == 1)})"
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, Mapping):
            return f"{{{{{', '.join(f'{key}: {text(entry)}' for key, entry in value.items())}}}}}"
        if isinstance(value, slice):
            return ":".join("" if part is None else text(part) for part in (value.start, value.stop, value.step))
        if isinstance(value, torch.dtype | torch.device | torch.memory_format):
            return str(value).removeprefix("torch.")
        return repr(value).replace("{", "{{").replace("}", "}}")

    if node.op == "placeholder":
        return "", []
    parts = [*map(text, node.args), *(f"{name}={text(value)}" for name, value in node.kwargs.items())]
    return ", ".join(parts), reads


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list) and any(isinstance(part, torch.Tensor) for part in value):
        return f"({', '.join(map(_value, value))})"
    return ""


def _attribute(node: Node) -> Any:
    """Return the value of a `get_attr` node, None for every other node."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return None
    parent, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(parent), name, None)
