"""Finds the residual adds of a normalised graph: every addition of two floating-point tensors gets one verdict.

A residual add is a sum in which every term but one, the skip, is computed from the trunk value x, differentiably and through at least one
contraction (a matrix product, a convolution, attention). The skip is x itself, or comes from it by operations that can run on every stream: a
scale (DeepNorm), a cast, a slice, a pooling. Nothing is recognised by the name of a model or a module.

The cost is linear in the size of the graph plus, for every site, the size of its branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from mhc_compile.passes.analysis.aliases import Aliases
from mhc_compile.passes.analysis.dependence import Reach, contracts, weights_of
from mhc_compile.passes.analysis.feature_axis import entry_axis, exit_axis
from mhc_compile.passes.analysis.op_info import INPLACE_ADDS, is_contraction, is_update, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance, common_owner
from mhc_compile.passes.analysis.sum_terms import (
    SHORTCUT,
    carried,
    cheap_path,
    describe,
    flatten,
    is_candidate,
    operands,
    same_shape,
    same_size,
)
from mhc_compile.passes.lifting.trunk_path import TrunkPath, trunk_path_between
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo, BranchTail
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.fx import Graph, Node

__all__ = ["Findings", "find"]


@dataclass(frozen=True)
class Findings:
    """What `find` saw: `sites` and `rejections`, each in graph order, and who shares memory with whom in the graph."""

    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    aliases: Aliases


@dataclass(frozen=True)
class _Split:
    """A sum, taken apart: `skip` comes from `trunk` by cheap operations, every other term through a contraction."""

    trunk: Node
    skip: Node
    others: tuple[Node, ...]


def find(graph: Graph, provenance: Provenance, edges: BoundaryInfo = BoundaryInfo()) -> Findings:  # noqa: B008 - frozen
    """One verdict for every addition of two floating-point tensors in `graph`, which must carry example values."""
    return _Finder(graph, provenance, edges).run()


class _Finder:
    def __init__(self, graph: Graph, provenance: Provenance, edges: BoundaryInfo) -> None:
        self.graph = graph
        self.edges = edges
        self.provenance = provenance
        self.weights = weights_of(graph, provenance)
        self.aliases = Aliases(graph)
        self.order = self.aliases.order
        candidates = [node for node in graph.nodes if is_candidate(node)]
        terms = {term for add in candidates for term in operands(add)}
        origins = {origin for term in terms for origin in self._origins(term)}
        for term in terms:
            product = next((node for node in cheap_path(term) if is_contraction(node)), None)
            origins.update(self._behind(product) if product is not None else ())
        self.reach = Reach(graph, sorted(terms | origins, key=self.order.__getitem__), self.aliases, self.weights)
        self.sites: list[Site] = []
        self.rejections: list[Rejection] = []
        self.decided: set[Node] = set()
        # From the last add to the first, so that the outermost add of a sum tree is seen before its parts.
        self.candidates = candidates[::-1]

    def run(self) -> Findings:
        for node in self.candidates:
            if node not in self.decided:
                self._decide(node)
        return Findings(tuple(reversed(self.sites)), tuple(reversed(self.rejections)), self.aliases)

    def _decide(self, add: Node) -> None:
        adds, terms = flatten(add)
        verdict = self._judge(add, adds, terms)
        if not verdict and len(adds) > 1:
            # The whole sum is no site; its parts may be: `(x + f(x)) + memory`.
            adds = (add,)
            verdict = self._judge(add, adds, operands(add))
        self.decided.update(adds)
        if isinstance(verdict, Site):
            self.sites.append(verdict)
        else:
            self.rejections.append(verdict)

    def _reject(self, add: Node, reason: Reason, message: Callable[[], str]) -> Rejection:
        stack = self.provenance.stack(add)
        return Rejection(add, reason, message, stack[-1].path if stack else "")

    def _judge(self, add: Node, adds: tuple[Node, ...], terms: tuple[Node, ...]) -> Site | Rejection:
        if op_name(add) in INPLACE_ADDS:
            return self._reject(
                add,
                Reason.MUTATED_OPERAND,
                lambda: f"'{add.args[0]}' is written in place and may be read again under another name",
            )
        split = self._split(add, terms)
        if isinstance(split, Rejection):
            tail = self._tail(add, adds, terms) if split.reason is Reason.INDEPENDENT and self.edges.inputs else None
            return split if tail is None else tail
        problem = self._shape_problem(add, terms, split)
        if problem is not None:  # a rejection is falsy
            return problem
        branch = self.reach.between(split.trunk, split.others)
        streams = next((node for node in branch if is_update(node)), None)
        if streams is not None:
            return self._reject(add, Reason.REWRITTEN, lambda: f"its branch already runs on streams, '{streams}'")
        problem = self._written(add, split, branch)
        if problem is not None:
            return problem
        return self._site(add, adds, split, branch)

    def _split(self, add: Node, terms: tuple[Node, ...]) -> _Split | Rejection:
        """The roles of the terms, or why they have none."""
        if len(set(terms)) != len(terms):
            twice = next(term for term in terms if terms.count(term) > 1)
            return self._reject(add, Reason.SAME_VALUE, lambda: f"'{twice}' is added to itself")
        for skip in sorted(terms, key=self.order.__getitem__):
            others = tuple(term for term in terms if term is not skip)
            for trunk in self._origins(skip):
                if all(self.reach.contracted(trunk, term) for term in others) and not self._related(trunk, others):
                    return _Split(trunk, skip, others)
                if trunk is skip and all(self.reach.value(trunk, term) for term in others):
                    break  # a polynomial of the skip: what lies before it is not its trunk
        return self._no_split(add, terms)

    def _origins(self, term: Node) -> Iterator[Node]:
        """`term`, and the values that it comes from by a chain of cheap operations, nearest first."""
        node: Node | None = term
        for _ in range(SHORTCUT + 1):
            if node is None or tensor_value(node) is None:
                return
            if node is term or len(node.users) > 1:  # a trunk is read by its branch as well
                yield node
            node = carried(node)

    def _tail(self, add: Node, adds: tuple[Node, ...], terms: tuple[Node, ...]) -> Site | Rejection | None:
        """The verdict on a sum whose branch began in another graph; None if it is none."""
        for skip in terms:
            others = tuple(term for term in terms if term is not skip)
            if skip not in self.edges.inputs:
                continue
            behind = [self._behind_term(term) for term in others]
            foreign = tuple(tuple(node for node in nodes if node in self.edges.inputs) for nodes in behind)
            products = sorted(node for nodes in behind for node in nodes if contracts(node, self.weights))
            tail = self.edges.tail(add, skip, foreign, bool(products)) if all(foreign) else None
            if tail is None:
                continue
            if isinstance(tail, str):
                return self._reject(add, Reason.BROKEN_BRANCH, lambda tail=tail: tail)  # type: ignore[misc]
            return self._tail_site(add, adds, _Split(skip, skip, others), tail, products)
        return None

    def _tail_site(
        self, add: Node, adds: tuple[Node, ...], split: _Split, tail: BranchTail, products: list[Node]
    ) -> Site | Rejection:
        problem = self._shape_problem(add, (split.skip, *split.others), split)
        if problem is None:
            problem = self._written(add, split, ())
        if problem is not None:
            return problem
        total = tensor_value(add)
        assert total is not None
        axis = tail.axis + total.dim()
        width = _fixed(total.shape[axis])
        if width is None:
            return self._reject(
                add, Reason.DYNAMIC_WIDTH, lambda: f"axis {axis} of {describe(total)} has no fixed size"
            )
        owner, name = tail.owner, tail.name
        if products:  # the branch ends in this graph
            above, child = common_owner(self.provenance.stack(add), self.provenance.stack(products[-1]))
            owner = above or owner
            name, _ = self._name(owner, child, products[-1])
        assert name is not None
        return Site(
            add=add,
            adds=adds,
            trunk=split.trunk,
            ready=split.trunk,
            skip=split.skip,
            shortcut=TrunkPath.empty(split.skip, axis),
            terms=split.others,
            branch=frozenset(),
            anchor=add,
            width=width,
            axis=axis,
            owner=owner,
            name=name,
            declaring_module=tail.owner,
            tail=True,
            heads=tail.heads,
        )

    def _behind_term(self, term: Node) -> list[Node]:
        """`term` and everything that it is computed from."""
        found, stack = {term: None}, [term]
        while stack:
            fresh = [operand for operand in stack.pop().all_input_nodes if operand not in found]
            found.update(dict.fromkeys(fresh))
            stack.extend(fresh)
        return list(found)

    def _related(self, trunk: Node, terms: tuple[Node, ...]) -> bool:
        """Whether one of the terms is computed from another one, or from what the other comes from by cheap operations.

        Then they are no parallel branches, and the adds are judged one by one: `x + (dropout(y) + f(y))`.
        """
        for one in terms if len(terms) > 1 else ():
            others = [other for other in terms if other is not one]
            if one is not trunk and any(self.reach.anyhow(one, other) for other in others):
                return True
            for origin in self._origins(one):
                if origin is trunk:
                    break
                if any(self.reach.contracted(origin, other) for other in others):
                    return True
        return False

    def _no_split(self, add: Node, terms: tuple[Node, ...]) -> Rejection:
        reach, total = self.reach, tensor_value(add)
        if total is None or not total.dtype.is_floating_point:
            return self._reject(add, Reason.DTYPE, lambda: "the sum is complex, or of unknown shape")
        full = [term for term in terms if same_shape(tensor_value(term), total)]
        if len(full) < len(terms):
            shown = ", ".join(describe(value) for term in terms if (value := tensor_value(term)) is not None)
            return self._reject(add, Reason.BROADCAST, lambda: f"the terms have different shapes: {shown}")
        skip = min(terms, key=self.order.__getitem__)
        others = tuple(term for term in terms if term is not skip)
        strangers = [term for term in others if not reach.value(skip, term)]
        if strangers and not reach.anyhow(skip, strangers[0]):
            projected = self._projected(add, terms)
            if projected is not None:
                return projected
            return self._reject(add, Reason.INDEPENDENT, lambda: f"'{strangers[0]}' does not depend on '{skip}'")
        if strangers:
            return self._reject(
                add,
                Reason.NOT_DIFFERENTIABLE,
                lambda: f"'{strangers[0]}' depends on '{skip}' only through shapes, integers or detached values",
            )
        if self._related(skip, others):
            return self._reject(add, Reason.INDEPENDENT, lambda: "the terms of the sum are computed from each other")
        plain = next(term for term in others if not reach.contracted(skip, term))
        return self._reject(
            add,
            Reason.NO_CONTRACTION,
            lambda: (
                f"'{plain}' is computed from '{skip}' without a product, a convolution or attention that has weights"
            ),
        )

    def _projected(self, add: Node, terms: tuple[Node, ...]) -> Rejection | None:
        """The rejection of a merge whose skip is itself a contraction of the trunk, None if it is no such merge."""
        for skip in terms:
            product = next((node for node in cheap_path(skip) if is_contraction(node)), None)
            if product is None:
                continue
            for trunk in self._behind(product):
                others = [term for term in terms if term is not skip]
                if not all(self.reach.contracted(trunk, term) for term in others):
                    continue
                if self._mixes_streams(product):
                    return self._reject(
                        add,
                        Reason.MULTI_STREAM,
                        lambda trunk=trunk, product=product: (  # type: ignore[misc]
                            f"the skip is '{trunk}' mixed by the data-dependent product '{product}': residual streams of the model's own"
                        ),
                    )
                if all(self.reach.contracted_twice(trunk, term) for term in others):
                    return self._reject(
                        add,
                        Reason.PROJECTED_SKIP,
                        lambda trunk=trunk, product=product: f"the skip is '{trunk}' projected by '{product}'",  # type: ignore[misc]
                    )
        return None

    def _behind(self, product: Node) -> Iterator[Node]:
        """The values that a contraction reads, and what they come from by cheap operations."""
        for operand in product.all_input_nodes:
            if tensor_value(operand) is not None and operand not in self.weights:
                yield from self._origins(operand)

    def _mixes_streams(self, product: Node) -> bool:
        return sum(operand not in self.weights for operand in product.all_input_nodes) > 1

    def _shape_problem(self, add: Node, terms: tuple[Node, ...], split: _Split) -> Rejection | None:
        total, skip = tensor_value(add), tensor_value(split.skip)
        shown = ", ".join(describe(value) for term in terms if (value := tensor_value(term)) is not None)
        if total is None or skip is None:
            return self._reject(add, Reason.DTYPE, lambda: "a term is not a tensor of known shape")
        if not same_shape(skip, total):
            return self._reject(add, Reason.BROADCAST, lambda: f"the skip is broadcast: {shown}")
        if not total.dtype.is_floating_point:
            return self._reject(add, Reason.DTYPE, lambda: f"terms {shown} give {describe(total)}")
        if total.dim() < 2:
            return self._reject(
                add, Reason.NO_FEATURE_AXIS, lambda: f"terms {shown} have no token axis beside a feature axis"
            )
        return None

    def _written(self, add: Node, split: _Split, branch: tuple[Node, ...]) -> Rejection | None:
        """The rejection of a site whose values are written in place at a moment at which streams could not follow."""
        victims: list[tuple[Node, Node]] = []
        victims += [(add, writer) for writer in self.aliases.writers(add)[:1]]
        for term in split.others:
            late = self.aliases.written_after(term, self.order[add])
            victims += [(term, late)] if late is not None else []
        for value in dict.fromkeys((split.trunk, split.skip)):
            writers = self.aliases.writers(value)
            if not writers:
                continue
            ready = self.order[writers[-1]]
            readers, names = {*branch, split.skip, add}, {*writers, *self.aliases.of(value)}
            early = [
                user for user in value.users if self.order[user] < ready and (user in readers or user not in names)
            ]
            if early or ready > self.order[add] or value is not split.trunk:
                victims.append((value, writers[-1]))
        if not victims:
            return None
        victim, writer = victims[0]
        return self._reject(add, Reason.MUTATED_OPERAND, lambda: f"'{victim}' is written in place by '{writer}'")

    def _site(self, add: Node, adds: tuple[Node, ...], split: _Split, branch: tuple[Node, ...]) -> Site | Rejection:
        total = tensor_value(add)
        assert total is not None
        anchor = [node for node in branch if contracts(node, self.weights)][-1]
        shortcut = self._shortcut(split, branch, anchor)
        if shortcut is None:
            return self._reject(
                add,
                Reason.FEATURE_AXIS,
                lambda: (
                    f"neither the first reader of '{split.trunk}' nor '{anchor}' tells which axis of {describe(total)} holds the features"
                ),
            )
        if isinstance(shortcut, str):
            return self._reject(add, Reason.PROJECTED_SKIP, lambda: shortcut)
        axis = shortcut.axes[split.trunk]
        trunk = tensor_value(split.trunk)
        assert trunk is not None
        width = _fixed(trunk.shape[axis])
        if width is None:
            return self._reject(
                add, Reason.DYNAMIC_WIDTH, lambda: f"axis {axis} of {describe(trunk)} has no fixed size"
            )
        owner, child = common_owner(self.provenance.stack(add), self.provenance.stack(anchor))
        if owner is None:
            return self._reject(add, Reason.NO_OWNER, lambda: "the add is performed outside every module")
        name, declaring_module = self._name(owner, child, anchor)
        if declaring_module is None:
            return self._reject(
                add,
                Reason.NO_CARRIER,
                lambda: (
                    f"the branch ends in '{anchor}', written with parameters of the compiled module itself; no module call can declare ours"
                ),
            )
        writers = self.aliases.writers(split.trunk)
        return Site(
            add=add,
            adds=adds,
            trunk=split.trunk,
            ready=writers[-1] if writers else split.trunk,
            skip=split.skip,
            shortcut=shortcut,
            terms=split.others,
            branch=frozenset(branch),
            anchor=anchor,
            width=width,
            axis=shortcut.axes[split.skip],
            owner=owner,
            name=name,
            declaring_module=declaring_module,
        )

    def _shortcut(self, split: _Split, branch: tuple[Node, ...], anchor: Node) -> TrunkPath | str | None:
        """The operations from the trunk to the skip. None where the feature axis is unknown, a sentence where they cannot run on streams."""
        last = max(split.others, key=self.order.__getitem__)
        entry, leaving = entry_axis(split.trunk, branch), exit_axis(anchor, last, branch)
        known = [axis for axis in (entry, leaving) if axis is not None and axis >= 0]
        if not known:
            return None
        trunk, skip = tensor_value(split.trunk), tensor_value(split.skip)
        assert trunk is not None
        assert skip is not None
        trunk_path = (
            trunk_path_between(split.trunk, split.skip, known[0], self.aliases) if known[0] < trunk.dim() else None
        )
        if trunk_path is None:
            return f"'{split.skip}' comes from the trunk '{split.trunk}' by operations that cannot run on streams"
        if not same_size(trunk.shape[known[0]], skip.shape[trunk_path.axes[split.skip]]):
            return f"'{split.skip}' has another width than the trunk '{split.trunk}' that the branch reads"
        return trunk_path

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


def _fixed(size: object) -> int | None:
    """A size that is a number. Under dynamic shapes it may be a symbol, which a norm's weights have perhaps pinned down since."""
    return int(size) if isinstance(size, int) or (isinstance(size, torch.SymInt) and is_concrete_int(size)) else None


def _below(owner: str, path: str) -> str:
    """`path` relative to `owner`; "" if it lies elsewhere."""
    if not owner:
        return path
    return path.removeprefix(owner + ".") if path.startswith(owner + ".") else ""
