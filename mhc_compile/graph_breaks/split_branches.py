"""Branches that a graph break cuts in two: how the graph with the residual add finds the one in which the branch began.

Dynamo compiles the graph with the head of the branch first, and cannot know what will become of it.
So every graph leaves a note in the history of what it computes from a trunk value: "this was
computed from that tensor, by these modules". When a later graph adds a tensor with such a note to
the very tensor, the two belong together. The modules of the head get the declaration of the
parameters, and its graph is traced again at its next call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, HyperConnections
from mhc_compile.graph_breaks.stream_registry import history, registered_streams
from mhc_compile.passes.planning.graph_boundary import BranchTail

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import CodeType

    from torch.fx import Node

    from mhc_compile.capture.provenance import DynamoProvenance
    from mhc_compile.passes.analysis.provenance import ModuleRef
    from mhc_compile.passes.planning.split_branches import BranchHead

__all__ = ["Beginning", "Notes", "find_tail"]

#: The key of `Node.metadata` under which a history holds notes.
_NOTES = "mhc_beginnings"
#: A branch that is longer than this many operations is not followed to its beginning.
_LONGEST = 20_000


@dataclass(frozen=True, eq=False)
class Beginning:
    """The head of a branch that may end in another graph: its modules, the feature axis (< 0) of its trunk, its frame."""

    modules: tuple[weakref.ref[nn.Module], ...]
    axis: int
    #: The module whose method the frame was, and the code of that.
    root: weakref.ref[nn.Module] | None
    code: weakref.ref[CodeType]

    def alive(self) -> tuple[nn.Module, ...]:
        """The modules that still exist."""
        return tuple(module for reference in self.modules if (module := reference()) is not None)


@dataclass(frozen=True, eq=False)
class _Note:
    """Something was computed from `tensor` (a weak reference), in a branch whose last product with weights so far was that of `anchor`."""

    tensor: Any
    beginning: Beginning
    anchor: weakref.ref[nn.Module] | None


class Notes:
    """What one compiled graph writes into the history of its results.

    Args:
        heads: the heads of branches in the graph.
        provenance: of the graph.
        positions: the numbers of the graph's inputs by their targets.
        results: the graph's results.
    """

    def __init__(
        self,
        heads: Iterable[BranchHead],
        provenance: DynamoProvenance,
        positions: Mapping[str, int],
        results: Sequence[Any],
    ) -> None:
        code = weakref.ref(provenance.frame.code)
        self._entries: list[tuple[int | None, int | None, dict[int, weakref.ref[nn.Module] | None], Beginning]] = []
        for head in heads:
            modules = [provenance.module(ref) for ref in head.modules]
            example = head.value.meta["example_value"]
            beginning = Beginning(
                tuple(weakref.ref(module) for module in modules if module is not None),
                head.axis - example.dim(),
                weakref.ref(provenance.root) if provenance.root is not None else None,
                code,
            )
            number = None if head.value.op == "placeholder" else list(results).index(head.value)
            position = positions[str(head.value.target)] if number is None else None
            anchors = {
                index: provenance.module(ref) if ref is not None else None for index, ref in head.results.items()
            }
            reached = {index: weakref.ref(module) if module is not None else None for index, module in anchors.items()}
            self._entries.append((position, number, reached, beginning))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def write(self, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Leaves the notes. Where autograd does not record there is no history, and nothing to find."""
        for position, number, reached, beginning in self._entries:
            value = inputs[position] if position is not None else results[number]  # type: ignore[index]
            reference = _torch.TensorWeakRef(value)
            for index, anchor in reached.items():
                result = results[index]
                if isinstance(result, Tensor) and result.grad_fn is not None:
                    metadata: Any = result.grad_fn.metadata
                    metadata.setdefault(_NOTES, {}).setdefault(result.output_nr, []).append(
                        _Note(reference, beginning, anchor)
                    )


def find_tail(
    provenance: DynamoProvenance,
    values: Mapping[Node, Any],
    add: Node,
    skip: Node,
    foreign: tuple[tuple[Node, ...], ...],
    contracted: bool,
) -> BranchTail | str | None:
    """See `Edges.tail`."""
    trunk = values[skip]
    if not isinstance(trunk, Tensor):
        return None
    terms = [[values[node] for node in group if isinstance(values[node], Tensor)] for group in foreign]
    if not any(value.requires_grad for group in terms for value in group):
        return _known(provenance, add, trunk)
    paths = [_Path(trunk, group) for group in terms]
    if not all(path.notes or path.related for path in paths):
        return None
    if not all(path.notes for path in paths):
        return f"the branch of '{skip}' ran outside of this graph, and began where no module of a compiled graph read the trunk"
    beginnings = [note.beginning for path in paths for note in path.notes]
    _find_root(provenance, beginnings)
    ref, owner = _owner(provenance, add)
    if ref is None or owner is None:
        return f"the branch of '{skip}' ran outside of this graph, and nothing tells whose sum this is"
    modules = tuple(dict.fromkeys(module for beginning in beginnings for module in beginning.alive()))
    inside = {id(module): path for path, module in owner.named_modules()}
    if not modules or any(id(module) not in inside for module in modules):
        return (
            f"the branch of '{skip}' ran outside of this graph, in modules that {ref.path or ref.kind!r} does not have"
        )
    name = next((name for path in paths if (name := path.name(owner)) is not None), None)
    if name is None and not contracted:  # a norm alone, say
        return None
    return BranchTail(ref, name, beginnings[0].axis, tuple(beginnings))


class _Path:
    """What lies between a trunk value and tensors that one term of a sum is computed from.

    Attributes:
        notes: those about the trunk value.
        related: whether the tensors come from it in any way.
    """

    def __init__(self, trunk: Tensor, values: Sequence[Tensor]) -> None:
        self.notes: list[_Note] = []
        self.related = False
        self._weights: list[Any] = []
        start = (trunk.grad_fn, trunk.output_nr) if trunk.grad_fn is not None else None

        def arrived(step: tuple[Any, int]) -> bool:
            node, output = step
            about = [note for note in node.metadata.get(_NOTES, {}).get(output, ()) if note.tensor() is trunk]
            self.notes += about
            self.related = self.related or step == start
            return bool(about) or step == start

        for value in values:
            for node, _ in history(value, _LONGEST, arrived):
                weight = getattr(node, "variable", None)
                if weight is not None:
                    self._weights.append(weight)

    def name(self, owner: nn.Module) -> str | None:
        """Path below `owner` of the module that the last matrix on the way belongs to: the module that ends the branch. None without a matrix."""
        paths = {
            id(parameter): path
            for path, parameter in owner.named_parameters()
            if parameter.dim() >= 2 and CONTAINER not in path.split(".")
        }
        path = next((paths[id(weight)] for weight in self._weights if id(weight) in paths), None)
        if path is not None:
            return _called(owner, path)
        anchors = [module for note in self.notes if note.anchor is not None and (module := note.anchor()) is not None]
        inside = {id(module): path for path, module in owner.named_modules()}
        return next((_called(owner, f"{inside[id(module)]}.") for module in anchors if id(module) in inside), None)


def _owner(provenance: DynamoProvenance, add: Node) -> tuple[ModuleRef | None, nn.Module | None]:
    ref = next(iter(provenance.stack(add)[-1:]), None)
    return ref, provenance.module(ref) if ref is not None else None


def _find_root(provenance: DynamoProvenance, beginnings: Sequence[Beginning]) -> None:
    """A frame that has lost its module is a rest of the method in which the branch began."""
    if provenance.root is not None:
        return
    for beginning in beginnings:
        root, code = beginning.root() if beginning.root is not None else None, beginning.code()
        if root is not None and code is not None and _torch.same_function(code, provenance.frame.code):
            provenance.adopt_root(root)


def _known(provenance: DynamoProvenance, add: Node, trunk: Tensor) -> BranchTail | None:
    """Without a history: the one branch that was begun at `trunk` and belongs to the module that performs `add`."""
    entry = registered_streams(trunk)
    if entry is None:
        return None
    if provenance.root is None:
        roots = [root for begun in entry.open.values() if (root := begun.root()) is not None]
        if len(roots) == 1:
            provenance.adopt_root(roots[0])
    ref, owner = _owner(provenance, add)
    container = getattr(owner, CONTAINER, None)
    if ref is None or not isinstance(container, HyperConnections):
        return None
    names = [name for name in entry.open if container.get(name) is not None]
    return BranchTail(ref, names[0], entry.axis) if len(names) == 1 else None


def _called(owner: nn.Module, path: str) -> str:
    """The part of a parameter's path that names the outermost module that can be called: lists and dicts of modules cannot."""
    parts = path.split(".")[:-1]
    module: Any = owner
    for length, part in enumerate(parts, 1):
        module = module.get_submodule(part)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(parts[:length])
    return ".".join(parts) or "branch"
