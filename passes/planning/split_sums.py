"""Take sums apart: which term is the shortcut value, and which terms are branches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.aliases import Aliases
from mhc_compile.passes.analysis.dependence import Dependence, weights_of
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.analysis.sum_terms import (
    SHORTCUT,
    carried,
    describe,
    is_candidate,
    operands,
    product_behind,
    same_shape,
)
from mhc_compile.passes.planning.verdict import Reason, Rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.provenance import Provenance


@dataclass(frozen=True)
class Split:
    """A sum: `skip` comes from `trunk` by cheap operations, the others through contractions."""

    trunk: Node
    skip: Node
    others: tuple[Node, ...]


class SumSplitter:
    """The facts about a normalised graph that tell the terms of its sums apart."""

    def __init__(self, graph: Graph, provenance: Provenance) -> None:
        self.provenance = provenance
        self.weights = weights_of(graph, provenance)
        self.aliases = Aliases(graph)
        self.order = self.aliases.order
        self.candidates = [node for node in graph.nodes if is_candidate(node)]
        terms = {term for add in self.candidates for term in operands(add)}
        origins = {origin for term in terms for origin in self._origins(term)}
        for term in terms:
            product = product_behind(term)
            origins.update(self._behind(product) if product is not None else ())
        sources = sorted(terms | origins, key=self.order.__getitem__)
        self.dependence = Dependence(graph, sources, self.aliases, self.weights)

    def reject(self, add: Node, reason: Reason, message: Callable[[], str]) -> Rejection:
        """Return a rejection of `add` in the module that performs it."""
        stack = self.provenance.stack(add)
        return Rejection(add, reason, message, stack[-1].path if stack else "")

    def split(self, add: Node, terms: tuple[Node, ...]) -> Split | Rejection:
        """Return which term is the skip and which are branch outputs, or why there are none."""
        if len(set(terms)) != len(terms):
            twice = next(term for term in terms if terms.count(term) > 1)
            return self.reject(add, Reason.SAME_VALUE, lambda: f"'{twice}' is added to itself")
        for skip in sorted(terms, key=self.order.__getitem__):
            others = tuple(term for term in terms if term is not skip)
            for trunk in self._origins(skip):
                if all(self.dependence.contracted(trunk, term) for term in others) and not self._related(trunk, others):
                    return Split(trunk, skip, others)
                if trunk is skip and all(self.dependence.value(trunk, term) for term in others):
                    break  # a polynomial of the skip: the values before it are not its trunk
        return self._no_split(add, terms)

    def _origins(self, term: Node) -> Iterator[Node]:
        """Yield `term` and the values that it comes from by cheap operations, nearest first."""
        node: Node | None = term
        for _ in range(SHORTCUT + 1):
            if node is None or tensor_value(node) is None:
                return
            if node is term or len(node.users) > 1:  # a trunk is read by its branch as well
                yield node
            node = carried(node)

    def _related(self, trunk: Node, terms: tuple[Node, ...]) -> bool:
        """Return whether a term is computed from another, or from a value before that one.

        Then they are no parallel branches, and the adds are judged one by one: `x + (dropout(y) +
        f(y))`.
        """
        for one in terms if len(terms) > 1 else ():
            others = [other for other in terms if other is not one]
            if one is not trunk and any(self.dependence.at_all(one, other) for other in others):
                return True
            for origin in self._origins(one):
                if origin is trunk:
                    break
                if any(self.dependence.contracted(origin, other) for other in others):
                    return True
        return False

    def _no_split(self, add: Node, terms: tuple[Node, ...]) -> Rejection:
        dependence, total = self.dependence, tensor_value(add)
        if total is None or not total.dtype.is_floating_point:
            return self.reject(add, Reason.DTYPE, lambda: "the sum is complex, or of unknown shape")
        if not all(same_shape(tensor_value(term), total) for term in terms):
            shown = ", ".join(describe(value) for term in terms if (value := tensor_value(term)) is not None)
            return self.reject(add, Reason.BROADCAST, lambda: f"the terms have different shapes: {shown}")
        skip = min(terms, key=self.order.__getitem__)
        others = tuple(term for term in terms if term is not skip)
        strangers = [term for term in others if not dependence.value(skip, term)]
        if strangers and not dependence.at_all(skip, strangers[0]):
            return self._projected(add, terms) or self.reject(
                add, Reason.INDEPENDENT, lambda: f"'{strangers[0]}' does not depend on '{skip}'"
            )
        if strangers:
            return self.reject(
                add,
                Reason.NOT_DIFFERENTIABLE,
                lambda: f"'{strangers[0]}' depends on '{skip}' only through shapes, integers or detached values",
            )
        if self._related(skip, others):
            return self.reject(add, Reason.INDEPENDENT, lambda: "the terms of the sum are computed from each other")
        plain = next(term for term in others if not dependence.contracted(skip, term))
        without = "'{}' is computed from '{}' without a product, a convolution or attention that has weights"
        return self.reject(add, Reason.NO_CONTRACTION, lambda: without.format(plain, skip))

    def _projected(self, add: Node, terms: tuple[Node, ...]) -> Rejection | None:
        """Return the rejection of a merge whose skip is a contraction of the trunk, or None."""
        for skip in terms:
            if (product := product_behind(skip)) is None:
                continue
            for trunk in self._behind(product):
                others = [term for term in terms if term is not skip]
                if not all(self.dependence.contracted(trunk, term) for term in others):
                    continue
                if sum(operand not in self.weights for operand in product.all_input_nodes) > 1:
                    mixed = (
                        "the skip is '{}' mixed by the data-dependent product '{}': residual streams of the model's own"
                    )
                    return self.reject(add, Reason.MULTI_STREAM, partial(mixed.format, trunk, product))
                if all(self.dependence.contracted_twice(trunk, term) for term in others):
                    projected = "the skip is '{}' projected by '{}'"
                    return self.reject(add, Reason.PROJECTED_SKIP, partial(projected.format, trunk, product))
        return None

    def _behind(self, product: Node) -> Iterator[Node]:
        """Yield the values that a contraction reads, and what they cheaply come from."""
        for operand in product.all_input_nodes:
            if tensor_value(operand) is not None and operand not in self.weights:
                yield from self._origins(operand)
