"""Provenance of a Dynamo graph: modules by identity, parameters by the objects of graph inputs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile import _torch
from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import Graph, Node

    from mhc_compile.capture.frame import Frame

#: Dynamo's module names: "L['self'].transformer.h.0", "L['fn']". The path follows the local.
_LOCAL = re.compile(r"^[LG]\[[^\]]*\]\.?")


class DynamoProvenance(Provenance):
    """Maps nodes to modules, and graph inputs to parameters by the example inputs.

    Valid while Dynamo traces the frame.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any], frame: Frame) -> None:
        self.frame = frame
        self.root: nn.Module | None = None
        self._paths: dict[int, str] = {}
        self._names: dict[str, str] = {}
        if frame.root is not None:
            self.adopt_root(frame.root)
        # `functional_call` puts tensors in the place of parameters.
        named = _torch.named_parameter_slots(frame.root) if frame.root is not None else ()
        names = {id(value): path for path, value in named}
        buffers = {id(buffer) for buffer in frame.root.buffers()} if frame.root is not None else set()
        self._buffers: set[str] = set()
        # The target of a placeholder is unique and survives copies of the graph.
        self._targets: dict[int, str] = {}
        placeholders = graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, inputs, strict=True):
            if id(value) in buffers:
                self._buffers.add(str(node.target))
            if isinstance(value, nn.Parameter) or id(value) in names:
                self._targets.setdefault(id(value), str(node.target))
                self._names[str(node.target)] = names.get(id(value), "")

    def adopt_root(self, root: nn.Module) -> None:
        """Set the module whose method the frame is, which is unknown after some graph breaks."""
        self.root = root
        for path, module in root.named_modules():
            self._paths.setdefault(id(module), path)

    def stack(self, node: Node) -> tuple[ModuleRef, ...]:
        """Return the root, then the modules whose calls surround `node`."""
        refs = []
        for key, (name, kind) in node.meta.get("nn_module_stack", {}).items():
            path = self._paths.get(_identity(str(key)), _LOCAL.sub("", name))
            refs.append(ModuleRef(str(key), path, getattr(kind, "__name__", str(kind))))
        if self.root is not None and (not refs or _identity(refs[0].key) != id(self.root)):
            refs.insert(0, ModuleRef(str(id(self.root)), "", type(self.root).__name__, called=False))
        return tuple(refs)

    def parameter_name(self, node: Node) -> str | None:
        """Return the path of the parameter that a graph input is."""
        return self._names.get(str(node.target)) if node.op == "placeholder" else None

    def name_parameter(self, node: Node, path: str) -> None:
        """Record that the graph input `node` stands for the future parameter at `path`."""
        self._names[str(node.target)] = path

    def holds_weights(self, node: Node) -> bool:
        """Whether `node` is the graph input of a parameter or a buffer."""
        return super().holds_weights(node) or (node.op == "placeholder" and str(node.target) in self._buffers)

    def module(self, ref: ModuleRef) -> nn.Module | None:
        """Return the module itself."""
        identity = _identity(ref.key)
        if self.root is not None and identity == id(self.root):
            return self.root
        return _torch.module_by_id(identity)

    def model_around(self, node: Node, owner: nn.Module) -> nn.Module | None:
        """Return the outermost module around `node` that contains `owner`: the root, if it does.

        A function may call several models.
        """
        around = (self.module(ref) for ref in self.stack(node))
        return next((model for model in around if model is not None and owner in model.modules()), None)

    def target_of(self, parameter: Tensor) -> str | None:
        """Return the target of the graph input that is this parameter object."""
        return self._targets.get(id(parameter))


def _identity(key: str) -> int:
    """Return the module's `id`: the key without the call number ("140…@1")."""
    return int(key.split("@")[0])
