"""Provenance of the graphs that Dynamo hands to a backend: modules by identity, parameters by the object behind each graph input."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile import _torch
from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Graph, Node

    from mhc_compile.capture.frame import Frame

__all__ = ["DynamoProvenance"]

#: "L['self'].transformer.h.0" and "L['fn']" as Dynamo names modules; what follows the local is the
#: path below the root.
_LOCAL = re.compile(r"^[LG]\[[^\]]*\]\.?")


class DynamoProvenance(Provenance):
    """Valid while Dynamo traces the frame whose graph it describes.

    Args:
        graph: the graph as Dynamo made it.
        inputs: the example inputs of the backend, in the order of the graph's placeholders.
        frame: the frame that is traced.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], frame: Frame) -> None:
        self.frame = frame
        self.root: nn.Module | None = None
        self._paths: dict[int, str] = {}
        self._names: dict[str, str] = {}
        if frame.root is not None:
            self.adopt_root(frame.root)
        names: dict[int, str] = (
            {id(parameter): path for path, parameter in self.root.named_parameters(remove_duplicate=False)}
            if self.root
            else {}
        )
        buffers: set[int] = {id(buffer) for buffer in self.root.buffers()} if self.root else set()
        self._buffers: set[str] = set()
        # Placeholders keep their target through every copy of the graph, and it is unique.
        self._targets: dict[int, str] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, value in zip(placeholders, inputs, strict=True):
            if id(value) in buffers:
                self._buffers.add(str(node.target))
            if isinstance(value, nn.Parameter):
                self._targets.setdefault(id(value), str(node.target))
                self._names[str(node.target)] = names.get(id(value), "")

    def adopt_root(self, root: nn.Module) -> None:
        """Names the module whose method the frame is, where the frame has lost it: behind a graph break it keeps what it still needs, and no more."""
        self.root = root
        for path, module in root.named_modules():
            self._paths.setdefault(id(module), path)

    def stack(self, node: Node) -> tuple[ModuleRef, ...]:
        """The root, then the modules whose calls surround `node`."""
        refs = [self._ref(str(key), name, kind) for key, (name, kind) in node.meta.get("nn_module_stack", {}).items()]
        if self.root is not None and (not refs or _identity(refs[0]) != id(self.root)):
            refs.insert(0, ModuleRef(str(id(self.root)), "", type(self.root).__name__, called=False))
        return tuple(refs)

    def _ref(self, key: str, name: str, kind: Any) -> ModuleRef:
        identity = int(key.split("@")[0])
        path = self._paths.get(identity)
        if path is None:
            path = _LOCAL.sub("", name)
        return ModuleRef(key, path, getattr(kind, "__name__", str(kind)))

    def parameter_name(self, node: Node) -> str | None:
        """Path of the parameter behind a graph input."""
        return self._names.get(str(node.target)) if node.op == "placeholder" else None

    def name_parameter(self, node: Node, path: str) -> None:
        """Says that `node`, a graph input, stands for the parameter that will be at `path`."""
        self._names[str(node.target)] = path

    def holds_weights(self, node: Node) -> bool:
        """Whether `node` is the graph input of a parameter or a buffer."""
        return super().holds_weights(node) or (node.op == "placeholder" and str(node.target) in self._buffers)

    def module(self, ref: ModuleRef) -> nn.Module | None:
        """The module itself."""
        identity = _identity(ref)
        if self.root is not None and identity == id(self.root):
            return self.root
        return _torch.module_by_id(identity)

    def target_of(self, parameter: nn.Parameter) -> str | None:
        """Target of the graph input through which `parameter`, the very object, enters the graph."""
        return self._targets.get(id(parameter))


def _identity(ref: ModuleRef) -> int:
    """`id` of the module: the key without the number of the call ("140…@1")."""
    return int(ref.key.split("@")[0])
