"""Branches that a graph break splits: find the head that belongs to a residual add.

Dynamo compiles the head of a branch before the graph with its add exists. Every graph therefore
annotates the autograd history of its results: "computed from that trunk tensor, by these modules".
When a later graph adds a result to that tensor, the two are one branch. The modules of the head
then declare the parameters, and its graph is traced again at its next call.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.attachment.declaration import begin_branch, begun_by, starting_paths
from mhc_compile.attachment.model_tree import CONTAINER, HyperConnections
from mhc_compile.graph_breaks.stream_registry import history, note_head, noted_heads, registered_streams
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.passes.planning.graph_boundary import BranchTail

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import CodeType

    from torch.fx import Node

    from mhc_compile.capture.provenance import DynamoProvenance
    from mhc_compile.passes.analysis.provenance import ModuleRef
    from mhc_compile.passes.planning.plan import BranchHead

    #: The graph inputs that each term of a sum comes from.
    Terms = tuple[tuple[Node, ...], ...]

#: The key of `Node.metadata` under which a history holds notes.
_NOTES = "mhc_beginnings"
#: A branch of more operations than this is not followed to its head.
_LONGEST = 20_000


@dataclass(frozen=True, eq=False)
class Beginning:
    """The head of a branch that may end in another graph: modules, feature axis (< 0), frame."""

    modules: tuple[weakref.ref[nn.Module], ...]
    axis: int
    #: The module whose method the frame is, and its code.
    root: weakref.ref[nn.Module] | None
    code: weakref.ref[CodeType]

    def alive(self) -> tuple[nn.Module, ...]:
        """Return the modules that still exist."""
        return tuple(module for reference in self.modules if (module := reference()) is not None)

    def begin(self, owner: str, name: str) -> None:
        """Let the modules start the branch of site `name` of the module `owner` below the root."""
        root, modules = self.root() if self.root is not None else None, self.alive()
        container = getattr(dict(root.named_modules()).get(owner), CONTAINER, None) if root is not None else None
        connection = container.get(name) if isinstance(container, HyperConnections) else None
        if connection is not None and len(modules) == len(self.modules):
            begin_branch(modules, connection, name)


@dataclass(frozen=True, eq=False)
class _Note:
    """A value computed from `tensor` (weak), the last product with weights by `last_module`."""

    tensor: Any
    beginning: Beginning
    last_module: weakref.ref[nn.Module] | None


class Notes:
    """The annotations that a graph with `heads` adds to the autograd history of its `results`.

    `positions` gives the positions of the graph's inputs by their targets.
    """

    def __init__(
        self, heads: Iterable[BranchHead], provenance: DynamoProvenance, positions: Mapping[str, int], results: Any
    ) -> None:
        self._entries: list[tuple[int | None, int | None, dict[int, weakref.ref[nn.Module] | None], Beginning]] = []
        for head in heads:
            modules = [provenance.module(ref) for ref in head.modules]
            example = head.value.meta["example_value"]
            beginning = Beginning(
                tuple(weakref.ref(module) for module in modules if module is not None),
                head.axis - example.dim(),
                weakref.ref(provenance.root) if provenance.root is not None else None,
                weakref.ref(provenance.frame.code),
            )
            number = None if head.value.op == "placeholder" else list(results).index(head.value)
            position = positions[str(head.value.target)] if number is None else None
            reached: dict[int, weakref.ref[nn.Module] | None] = {}
            for index, ref in head.results.items():
                last_module = provenance.module(ref) if ref is not None else None
                reached[index] = weakref.ref(last_module) if last_module is not None else None
            self._entries.append((position, number, reached, beginning))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def write(self, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Annotate the history of the results of one call, and the tensors that were read."""
        for position, number, reached, beginning in self._entries:
            value = inputs[position] if position is not None else results[number]  # type: ignore[index]
            reference = _torch.TensorWeakRef(value)
            for index, last_module in reached.items():
                result = results[index]
                if not isinstance(result, Tensor):
                    continue
                note = _Note(reference, beginning, last_module)
                note_head(value, (beginning, index), note, result)
                if result.grad_fn is not None:
                    metadata: Any = result.grad_fn.metadata
                    metadata.setdefault(_NOTES, {}).setdefault(result.output_nr, []).append(note)


def find_tail(
    provenance: DynamoProvenance, values: Mapping[Node, Any], add: Node, skip: Node, foreign: Terms, contracted: bool
) -> BranchTail | str | None:
    """Implement `BoundaryInfo.tail`: return a branch tail, the reason why it is lost, or None."""
    trunk = values[skip]
    if not isinstance(trunk, Tensor):
        return None
    terms = [[values[node] for node in group if isinstance(values[node], Tensor)] for group in foreign]
    if not any(value.requires_grad for group in terms for value in group):
        return _find_without_history(provenance, add, trunk, terms)
    paths = [_Path(trunk, group) for group in terms]
    if not all(path.notes or path.related for path in paths):
        return None
    if not all(path.notes for path in paths):
        return (
            f"the branch of '{skip}' ran outside of this graph, and began where no module of a compiled graph read the"
            " trunk"
        )
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
    if (
        name is None and not contracted and all(path.goes_on for path in paths)
    ):  # weights that are no parameters, as those of a quantised module
        name = _free_name(provenance, owner, modules, trunk)
    if name is None and not contracted:  # a norm alone, say
        return None
    return BranchTail(ref, name, beginnings[0].axis, tuple(beginnings))


class _Path:
    """The autograd history between a trunk tensor and the tensors in one term of a sum.

    Attributes:
        notes: the notes about the trunk tensor.
        related: whether the tensors depend on it at all.
    """

    def __init__(self, trunk: Tensor, values: Sequence[Tensor]) -> None:
        self.notes: list[_Note] = []
        self.related = False
        #: Whether other operations follow the graph that is noted.
        self.goes_on = False
        self._weights: list[Any] = []
        start = (trunk.grad_fn, trunk.output_nr) if trunk.grad_fn is not None else None

        def arrived(step: tuple[Any, int]) -> bool:
            node, output = step
            about = [note for note in node.metadata.get(_NOTES, {}).get(output, ()) if note.tensor() is trunk]
            self.notes += about
            self.related = self.related or step == start
            self.goes_on = self.goes_on or not about
            return bool(about) or step == start

        for value in values:
            for node, _ in history(value, _LONGEST, arrived):
                weight = getattr(node, "variable", None)
                if weight is not None:
                    self._weights.append(weight)

    def name(self, owner: nn.Module) -> str | None:
        """Return the path below `owner` of the module with the last weight matrix, or None."""
        paths = {
            id(parameter): path
            for path, parameter in owner.named_parameters()
            if parameter.dim() >= 2 and CONTAINER not in path.split(".")
        }
        path = next((paths[id(weight)] for weight in self._weights if id(weight) in paths), None)
        if path is not None:
            return _callable_path(owner, path)
        modules = [
            module for note in self.notes if note.last_module is not None and (module := note.last_module()) is not None
        ]
        inside = {id(module): path for path, module in owner.named_modules()}
        return next((_callable_path(owner, f"{inside[id(m)]}.") for m in modules if id(m) in inside), None)


def _owner(provenance: DynamoProvenance, add: Node) -> tuple[ModuleRef | None, nn.Module | None]:
    ref = next(iter(provenance.stack(add)[-1:]), None)
    return ref, provenance.module(ref) if ref is not None else None


def _find_root(provenance: DynamoProvenance, beginnings: Sequence[Beginning]) -> None:
    """Set the root of a frame that lost it: the rest of a method has the root of the head."""
    if provenance.root is not None:
        return
    for beginning in beginnings:
        root, code = beginning.root() if beginning.root is not None else None, beginning.code()
        if root is not None and code is not None and _torch.same_function(code, provenance.frame.code):
            provenance.adopt_root(root)


def _find_without_history(
    provenance: DynamoProvenance, add: Node, trunk: Tensor, terms: Sequence[Sequence[Tensor]]
) -> BranchTail | None:
    """Return the branch that began at `trunk`, of a hyper-connection that the module of `add` has.

    It is open, or read the trunk as it is.
    """
    entry, noted = registered_streams(trunk), noted_heads(trunk)
    heads = list(dict.fromkeys(note.beginning for note, _ in noted))
    branches = {name: begun for name, begun in entry.open.items() if not begun.left.taken} if entry is not None else {}
    if provenance.root is None:
        roots = {id(root): root for begun in branches.values() if (root := begun.root()) is not None}
        if len(roots) == 1:
            provenance.adopt_root(*roots.values())
        _find_root(provenance, heads)
    ref, owner = _owner(provenance, add)
    container = getattr(owner, CONTAINER, None)
    if ref is None or owner is None or not isinstance(container, HyperConnections):
        return None
    names = [name for name in branches if container.get(name) is not None]
    if entry is not None and names:
        return BranchTail(ref, names[0], entry.axis) if len(names) == 1 else None
    modules = tuple(dict.fromkeys(module for head in heads for module in head.alive()))
    if not modules or not set(modules) <= set(owner.modules()):
        return None
    if any(
        value is result() and note.last_module is None for note, result in noted for group in terms for value in group
    ):
        return None  # a norm alone
    name = _free_name(provenance, owner, modules, trunk)
    return BranchTail(ref, name, heads[0].axis, tuple(heads)) if name is not None else None


def _free_name(
    provenance: DynamoProvenance, owner: nn.Module, modules: tuple[nn.Module, ...], trunk: Tensor
) -> str | None:
    """Return the name of the first hyper-connection of `owner` whose branch `modules` may start.

    It is the one that they start already. Else its parameters are not in this graph, and no other
    modules start its branch; residual adds run in the order of their chain: it is the next after
    that of the trunk, if it has streams.
    """
    started, container, entry = starting_paths(owner), getattr(owner, CONTAINER, None), registered_streams(trunk)
    past = entry.left.index if entry is not None else -1
    if not isinstance(container, HyperConnections):
        return None
    begun = begun_by(modules)
    if begun is not None and container.get(begun[0]) is begun[1]:
        return begun[0]
    free = [
        (connection.index <= past, connection.index, name)
        for name, connection in container.named_modules()
        if isinstance(connection, HyperConnection)
        and provenance.target_of(connection.phi) is None
        and connection not in started
    ]
    return min(free)[-1] if free else None


def _callable_path(owner: nn.Module, path: str) -> str:
    """Return the leading part of a parameter's path that names a callable module, not a list."""
    parts = path.split(".")[:-1]
    module: Any = owner
    for length, part in enumerate(parts, 1):
        module = module.get_submodule(part)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(parts[:length])
    return ".".join(parts) or "branch"
