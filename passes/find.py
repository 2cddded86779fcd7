"""Finds the residual adds of a normalised graph: every addition of two floating-point tensors gets one verdict.

A residual add is a sum in which one term, the skip, is a value x, and every other term is computed from x, differentiably and through at least
one contraction (a matrix product, a convolution, attention). Nothing is recognised by the name of a model or a module.

The cost is linear in the size of the graph plus, for every add, the stretch between its skip and itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mhc_compile.passes.axes import entry_axis, exit_axis
from mhc_compile.passes.provenance import ModuleRef, Provenance, common_owner
from mhc_compile.passes.roles import ADDS, INPLACE_ADDS, is_contraction, op_name, passes_value, tensor_value, writer_of
from mhc_compile.passes.verdict import Reason, Refusal, Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import Graph, Node

__all__ = ["Findings", "find"]


@dataclass(frozen=True)
class Findings:
    """What `find` saw: `sites` and `refusals`, each in graph order."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class _Branch:
    """The stretch from a skip to the other terms: nodes that depend on the skip, in graph order."""

    nodes: tuple[Node, ...]
    contracted: frozenset[Node] = field(repr=False)


def find(graph: Graph, provenance: Provenance) -> Findings:
    """One verdict for every addition of two floating-point tensors in `graph`, which must carry example values."""
    return _Finder(graph, provenance).run()


class _Finder:
    def __init__(self, graph: Graph, provenance: Provenance) -> None:
        self.graph = graph
        self.provenance = provenance
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.sites: list[Site] = []
        self.refusals: list[Refusal] = []
        self.decided: set[Node] = set()

    def run(self) -> Findings:
        # From the last add to the first, so that the outermost add of a sum tree is seen before its parts.
        for node in reversed(list(self.graph.nodes)):
            if node not in self.decided and _is_candidate(node):
                self._decide(node)
        return Findings(tuple(reversed(self.sites)), tuple(reversed(self.refusals)))

    def _decide(self, add: Node) -> None:
        adds, terms = _flatten(add)
        verdict = self._judge(add, adds, terms)
        if not verdict and len(adds) > 1:
            # The whole sum is no site; its parts may be: `(x + f(x)) + memory`.
            adds = (add,)
            verdict = self._judge(add, adds, _operands(add))
        self.decided.update(adds)
        if isinstance(verdict, Site):
            self.sites.append(verdict)
        else:
            self.refusals.append(verdict)

    def _refuse(self, add: Node, reason: Reason, sentence: Callable[[], str]) -> Refusal:
        stack = self.provenance.stack(add)
        return Refusal(add, reason, sentence, stack[-1].path if stack else "")

    def _judge(self, add: Node, adds: tuple[Node, ...], terms: tuple[Node, ...]) -> Site | Refusal:
        if op_name(add) in INPLACE_ADDS:
            return self._refuse(
                add,
                Reason.MUTATED_OPERAND,
                lambda: f"'{add.args[0]}' is written in place and may be read again under another name",
            )
        problem = self._shape_problem(add, terms)
        if problem is not None:  # a refusal is falsy
            return problem
        skip = min(terms, key=self.order.__getitem__)
        others = tuple(term for term in terms if term is not skip)
        if len(others) != len(terms) - 1 or not others:
            return self._refuse(add, Reason.SAME_VALUE, lambda: f"'{skip}' is added to itself")
        branch = self._branch(skip, others)
        strangers = [term for term in others if term not in branch.nodes]
        if strangers:
            reason = Reason.NOT_DIFFERENTIABLE if self._depends_anyhow(skip, strangers[0]) else Reason.INDEPENDENT
            if reason is Reason.INDEPENDENT:
                return self._refuse(add, reason, lambda: f"'{strangers[0]}' does not depend on '{skip}'")
            return self._refuse(
                add,
                reason,
                lambda: f"'{strangers[0]}' depends on '{skip}' only through shapes, integers or detached values",
            )
        if len(others) > 1 and self._related(skip, others):
            # No parallel branches: one term is computed from another. The adds of the sum are judged one by one (`_decide`).
            return self._refuse(add, Reason.INDEPENDENT, lambda: "the terms of the sum are computed from each other")
        plain = [term for term in others if term not in branch.contracted]
        if plain:
            return self._refuse(
                add,
                Reason.NO_CONTRACTION,
                lambda: (
                    f"'{plain[0]}' is computed from '{skip}' by point-wise operations alone, without a product, a convolution or attention"
                ),
            )
        written = {writer: value for value in (skip, add, *others) if (writer := writer_of(value)) is not None}
        if written:
            writer, victim = next(iter(written.items()))
            return self._refuse(add, Reason.MUTATED_OPERAND, lambda: f"'{victim}' is written in place by '{writer}'")
        return self._site(add, adds, skip, others, branch)

    def _shape_problem(self, add: Node, terms: tuple[Node, ...]) -> Refusal | None:
        total = tensor_value(add)
        values = [tensor_value(term) for term in terms]
        if total is None or any(value is None for value in values):
            return self._refuse(add, Reason.DTYPE, lambda: "a term is not a tensor of known shape")
        shown = ", ".join(_describe(value) for value in values if value is not None)
        if any(not _same_shape(value, total) for value in values if value is not None):
            return self._refuse(add, Reason.BROADCAST, lambda: f"the terms have different shapes: {shown}")
        first = tensor_value(min(terms, key=self.order.__getitem__))
        if not total.dtype.is_floating_point or first is None or first.dtype != total.dtype:
            return self._refuse(add, Reason.DTYPE, lambda: f"terms {shown} give {_describe(total)}")
        if total.dim() < 2:
            return self._refuse(
                add, Reason.NO_FEATURE_AXIS, lambda: f"terms {shown} have no token axis beside a feature axis"
            )
        return None

    def _branch(self, skip: Node, others: tuple[Node, ...]) -> _Branch:
        """Nodes that carry a value from `skip` to `others`. Nothing before the skip in graph order can depend on it, so the walk ends there."""
        start = self.order[skip]
        region: set[Node] = set()
        stack = list(others)
        while stack:
            node = stack.pop()
            if node not in region and self.order[node] > start:
                region.add(node)
                stack.extend(node.all_input_nodes)
        reached = {skip: False}
        for node in sorted(region, key=self.order.__getitem__):
            inputs = [reached[source] for source in node.all_input_nodes if source in reached]
            if inputs and passes_value(node):
                reached[node] = any(inputs) or is_contraction(node)
        del reached[skip]
        return _Branch(tuple(reached), frozenset(node for node, contracted in reached.items() if contracted))

    def _related(self, skip: Node, terms: tuple[Node, ...]) -> bool:
        """Whether one of the terms is computed from another one."""
        return any(
            self._depends_anyhow(one, other) for one in terms for other in terms if one is not other and one is not skip
        )

    def _depends_anyhow(self, skip: Node, term: Node) -> bool:
        stack, seen = [term], set()
        while stack:
            node = stack.pop()
            if node is skip:
                return True
            if node not in seen and self.order[node] > self.order[skip]:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return False

    def _site(
        self, add: Node, adds: tuple[Node, ...], skip: Node, others: tuple[Node, ...], branch: _Branch
    ) -> Site | Refusal:
        value = tensor_value(add)
        assert value is not None
        anchors = [node for node in branch.nodes if is_contraction(node)]
        anchor = anchors[-1]
        last = max(others, key=self.order.__getitem__)
        axis = entry_axis(skip, branch.nodes)
        if axis is None or axis < 0:
            axis = exit_axis(anchor, last, branch.nodes)
        if axis is None or axis < 0:
            return self._refuse(
                add,
                Reason.FEATURE_AXIS,
                lambda: (
                    f"neither the first reader of '{skip}' nor '{anchor}' tells which axis of {_describe(value)} holds the features"
                ),
            )
        width: object = value.shape[axis]  # torch's stubs promise an int; under dynamic shapes it may be a SymInt
        if not isinstance(width, int):
            return self._refuse(
                add, Reason.DYNAMIC_WIDTH, lambda: f"axis {axis} of {_describe(value)} has no fixed size"
            )
        owner, child = common_owner(self.provenance.stack(add), self.provenance.stack(anchor))
        if owner is None:
            return self._refuse(add, Reason.NO_OWNER, lambda: "the add is performed outside every module")
        name, carrier = self._name(owner, child, anchor)
        if carrier is None:
            return self._refuse(
                add,
                Reason.NO_CARRIER,
                lambda: (
                    f"the branch ends in '{anchor}', written with parameters of the compiled module itself; no module call can declare ours"
                ),
            )
        return Site(
            add=add,
            adds=adds,
            skip=skip,
            terms=others,
            branch=frozenset(branch.nodes),
            anchor=anchor,
            width=width,
            axis=axis,
            owner=owner,
            name=name,
            carrier=carrier,
        )

    def _name(self, owner: ModuleRef, child: ModuleRef | None, anchor: Node) -> tuple[str, ModuleRef | None]:
        """The site's name below its owner, and the module whose call declares it.

        The name is the path of the module that ends the branch ("attn", "blocks.3"), or of the parameter where the owner does the work itself.
        """
        if child is not None:
            return _below(owner.path, child.path) or child.kind.lower(), child
        parameters = [self.provenance.parameter_name(source) for source in anchor.all_input_nodes]
        paths = [_below(owner.path, path) for path in parameters if path is not None]
        name = next((path for path in paths if path), "branch")
        return name, owner if owner.called else None


def _below(owner: str, path: str) -> str:
    """`path` relative to `owner`; "" if it lies elsewhere."""
    if not owner:
        return path
    return path.removeprefix(owner + ".") if path.startswith(owner + ".") else ""


def _is_candidate(node: Node) -> bool:
    if op_name(node) not in ADDS | INPLACE_ADDS:
        return False
    value = tensor_value(node)
    if value is None or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return False
    return len(_operands(node)) == 2


def _operands(node: Node) -> tuple[Node, ...]:
    return tuple(argument for argument in node.args[:2] if isinstance(argument, torch.fx.Node))


def _flatten(add: Node) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The adds and the terms of the sum tree that ends in `add`. Inner sums are read by this tree alone. `add` comes last."""
    if op_name(add) in INPLACE_ADDS:
        return (add,), _operands(add)
    adds: list[Node] = []
    terms: list[Node] = []
    stack = [add]
    while stack:
        node = stack.pop()
        adds.append(node)
        for term in _operands(node):
            whole = op_name(term) in ADDS and _is_candidate(term) and len(term.users) == 1
            inner = whole and _same_shape(tensor_value(term), tensor_value(node))
            (stack if inner else terms).append(term)
    return tuple(reversed(adds)), tuple(terms)


def _same_shape(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dim() != other.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))


def _describe(value: Tensor) -> str:
    return f"{[str(size) if not isinstance(size, int) else size for size in value.shape]} {str(value.dtype).removeprefix('torch.')}"
