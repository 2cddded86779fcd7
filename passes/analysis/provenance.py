"""Provenance of nodes: the modules whose calls surround a node, and the parameters that it reads.

Planning needs module paths and nothing else from outside the graph. A graph from
`torch.fx.symbolic_trace` carries them (`Provenance`); a Dynamo graph knows modules by identity, and
has its own provenance (`mhc_compile.capture.provenance`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mhc_compile.passes.analysis.op_info import tensor_value

if TYPE_CHECKING:
    from torch.fx import Node


@dataclass(frozen=True)
class ModuleRef:
    """One call of a module, as the graph knows it."""

    #: Identity inside this graph. Two calls of one module have different keys.
    key: str
    #: Path below the traced root; "" is the root itself.
    path: str
    #: Class name, for reports.
    kind: str
    #: False for the module whose own `forward` was handed to the tracer: its call, and so its
    #: hooks, lie outside the graph.
    called: bool = True


class Provenance:
    """Provenance of graphs from `torch.fx.symbolic_trace`, read from `nn_module_stack`."""

    def stack(self, node: Node) -> tuple[ModuleRef, ...]:
        """Return the calls around `node`, from the root to the innermost, or to a called leaf."""
        stack = node.meta.get("nn_module_stack", {})
        # `torch.export` writes the class by its qualified name.
        calls = (
            ModuleRef(str(key), path, getattr(kind, "__name__", str(kind).rpartition(".")[2]))
            for key, (path, kind) in stack.items()
            if path
        )
        return (ModuleRef("", "", "root"), *calls)

    def parameter_name(self, node: Node) -> str | None:
        """Return the path of the parameter that `node` stands for, or None."""
        return str(node.target) if node.op == "get_attr" else None

    def holds_weights(self, node: Node) -> bool:
        """Return whether `node` stands for a parameter or buffer of the model."""
        return (
            node.op == "get_attr"
            or isinstance(tensor_value(node), nn.Parameter)
            or self.parameter_name(node) is not None
        )


def common_owner(
    outer: tuple[ModuleRef, ...], inner: tuple[ModuleRef, ...]
) -> tuple[ModuleRef | None, ModuleRef | None]:
    """Return the deepest call that both stacks share, and the next one on `inner` (or None)."""
    depth = 0
    while depth < min(len(outer), len(inner)) and outer[depth].key == inner[depth].key:
        depth += 1
    owner = outer[depth - 1] if depth else None
    child = inner[depth] if depth < len(inner) else None
    return owner, child


def source_line(node: Node) -> str:
    """Return `file:line` of the model's source for this node, "" if it was not recorded."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not frames:
        return ""
    file, line, *_ = frames[-1].removeprefix('File "').split(", ")
    return f"{file.rstrip(chr(34))}:{line.removeprefix('line ')}"
