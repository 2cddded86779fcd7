"""A graph as plain data: names that people read, no tensors, nothing that keeps a model alive."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from mhc_compile.passes.analysis.op_info import leaf_module
from mhc_compile.passes.analysis.provenance import source_line
from mhc_compile.passes.planning.graph_boundary import ARRIVAL, BranchInput

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from mhc_compile.passes import Plan
    from mhc_compile.passes.analysis.provenance import Provenance

__all__ = ["NodeView", "Operation", "Role", "view"]

Operation = Literal["input", "parameter", "call", "output"]
#: "site": an add that becomes a hyper-connection. "left-alone": an addition that stays one. "stream": written by the rewrite.
Role = Literal["", "site", "left-alone", "stream"]

#: A name that one of the passes gave.
_OURS = "mhc_"


@dataclass(frozen=True)
class NodeView:
    """One node of a graph.

    Attributes:
        name: unique in its graph. A parameter is called by its path below the model, an input as the model's signature calls it.
        op: what kind of node it is.
        target: the operation: "torch.nn.functional.linear", "aten.add.Tensor", ".view", "mhc.update"; "" for inputs and the output.
        template: its arguments, with {} for every operand: "{}, {}, alpha=2".
        reads: the names of its operands, in the order of the template.
        value: dtype and shape, "float32[2, 8, 64]"; several in parentheses; "" if it is no tensor.
        module: path of the innermost module call that it belongs to; "" is the model itself.
        kind: class of that module.
        source: `file:line` in the model's code, "" if the tracer did not record it.
        role: see `Role`.
        site: path of the hyper-connection that it belongs to, or "".
        reason: code of the reason why an addition is left alone, or "".
    """

    name: str
    op: Operation
    target: str
    template: str
    reads: tuple[str, ...]
    value: str
    module: str
    kind: str
    source: str
    role: Role
    site: str
    reason: str

    @property
    def arguments(self) -> str:
        """The arguments, with operands by name. A parameter of the node's own module loses the module's path: ".weight"."""
        return self.template.format(*(self._short(name) for name in self.reads))

    def _short(self, name: str) -> str:
        return name[len(self.module) :] if self.module and name.startswith(f"{self.module}.") else name

    def __str__(self) -> str:
        if self.op == "output":
            return f"return {self.arguments}"
        if self.op != "call":
            return self.name
        if self.target.startswith("."):  # a method
            receiver, _, rest = self.arguments.partition(", ")
            return f"{self.name} = {receiver}{self.target}({rest})"
        return f"{self.name} = {self.target}({self.arguments})"


def view(graph: Graph, provenance: Provenance, plan: Plan | None = None, prefix: str = "") -> tuple[NodeView, ...]:
    """The nodes of `graph`, in order.

    Args:
        graph: with example values, as every stage of the rewrite leaves it.
        provenance: of the graph, or of the one that it was made from.
        plan: made on this very graph, or on one that it is a copy of; gives the roles of its adds.
        prefix: path of the module that the graph belongs to, below the model.
    """
    return tuple(_Viewer(provenance, plan, prefix).graph(graph))


class _Viewer:
    def __init__(self, provenance: Provenance, plan: Plan | None, prefix: str) -> None:
        self.provenance = provenance
        self.prefix = prefix
        self.names: dict[Node, str] = {}
        self.taken: set[str] = set()
        #: The hyper-connection that a node of ours belongs to.
        self.sites: dict[Node, str] = {}
        #: By name: passes copy graphs, and keep names.
        self.verdicts: dict[str, tuple[Role, str, str]] = {}
        #: The hyper-connections of branches that began in other graphs, by the name below their owner: their coefficients arrive.
        self.tails: dict[str, set[str]] = defaultdict(set)
        if plan is not None:
            for site in plan.sites:
                if site.tail:
                    self.tails[site.name].add(self._below(site.path))
            for rejection in plan.rejections:
                self.verdicts[rejection.add.name] = ("left-alone", "", rejection.reason.value)
            for site in plan.sites:
                self.verdicts.update({add.name: ("site", self._below(site.path), "") for add in site.adds})

    def graph(self, graph: Graph, inside: str = "") -> Iterator[NodeView]:
        """The nodes of `graph`; the body of a region stands in front of its call, `inside` its name."""
        for node in graph.nodes:
            body = _attribute(node)
            if isinstance(body, torch.fx.GraphModule):
                yield from self.graph(body.graph, f"{node.target}.")
            yield self.node(node, inside)

    def node(self, node: Node, inside: str) -> NodeView:
        """One node, behind all that it reads."""
        name = self.names[node] = self._unique(inside + self._name(node))
        template, reads = _template(node)
        stack = [ref for ref in self.provenance.stack(node) if ref.path] if node.op != "placeholder" else []
        role, site, reason = self.verdicts.get(node.name, self._ours(node))
        return NodeView(
            name=name,
            op=self._operation(node),
            target=_target(node) if node.op.startswith(("call_", "get_attr")) else "",
            template=template,
            reads=tuple(self.names[operand] for operand in reads),
            value=_value(node.meta.get("example_value", node.meta.get("val"))),
            module=self._below(stack[-1].path) if stack else self.prefix,
            kind=stack[-1].kind if stack else "",
            source=source_line(node),
            role=role,
            site=site,
            reason=reason,
        )

    def _operation(self, node: Node) -> Operation:
        if node.op == "placeholder":
            return "parameter" if self._parameter(node) else "input"
        if node.op == "get_attr":
            return "parameter"
        return "output" if node.op == "output" else "call"

    def _ours(self, node: Node) -> tuple[Role, str, str]:
        """Whether the rewrite wrote the node, and for which site: that of the parameters that it reads, or of the coefficients."""
        path = self._parameter(node).rpartition(".")[0]
        if ".mhc." in f".{path}.":
            self.sites[node] = self._below(path)
            return "stream", self.sites[node], ""
        closing = node.meta.get(ARRIVAL)
        if isinstance(closing, BranchInput) and len(self.tails[closing.name]) == 1:
            (self.sites[node],) = self.tails[closing.name]
        if not node.name.startswith(_OURS):
            return "", "", ""
        given = [
            *node.all_input_nodes,
            *(user.args[2] for user in node.users if user.target is torch.ops.mhc.update.default),
        ]
        sites = [
            self.sites[one] for one in given if isinstance(one, fx.Node) and one in self.sites and not _ends_site(one)
        ]
        if sites:
            self.sites[node] = sites[-1]
        return "stream", self.sites.get(node, ""), ""

    def _parameter(self, node: Node) -> str:
        if node.op == "get_attr":
            return str(node.target)
        if node.op != "placeholder":
            return ""
        return self.provenance.parameter_name(node) or ""

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


def _ends_site(node: Any) -> bool:
    """Whether what reads `node` belongs to the next site: it is the streams behind this one."""
    return bool(node.target is torch.ops.mhc.update.default)


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return type(leaf_module(node)).__name__
    if node.op == "get_attr":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = str(target)
        return name.removesuffix(".default")
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
        if isinstance(value, torch.fx.Node):
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
    """What a `get_attr` node reads, None for every other node."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return None
    parent, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(parent), name, None)
