"""Match residual adds: every addition of two floating-point tensors gets one verdict.

A residual add is a sum in which every term but one, the skip, is computed from the trunk value x,
differentiably and through at least one contraction (a matrix product, a convolution, attention).
The skip is x itself, or comes from it by operations that can run on every stream: a scale
(DeepNorm), a cast, a slice, a pooling. Names of models and modules do not matter.

The cost is linear in the size of the graph plus, for every site, the size of its branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from mhc_compile.passes.analysis.dependence import closure, contracts
from mhc_compile.passes.analysis.feature_axis import entry_axis, exit_axis
from mhc_compile.passes.analysis.op_info import INPLACE_ADDS, is_update, known_tensor, op_name, tensor_value
from mhc_compile.passes.analysis.positions import shifted
from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance, common_owner
from mhc_compile.passes.analysis.sum_terms import describe, flatten, operands, same_shape, same_size
from mhc_compile.passes.lifting.trunk_op import Obstacle
from mhc_compile.passes.lifting.trunk_path import TrunkPath, trunk_path_between
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo, BranchTail
from mhc_compile.passes.planning.split_sums import Split, SumSplitter
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.aliases import Aliases


@dataclass(frozen=True)
class Findings:
    """The verdicts on a graph, each kind in graph order, and its alias analysis."""

    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    aliases: Aliases


def find(graph: Graph, provenance: Provenance, edges: BoundaryInfo = BoundaryInfo()) -> Findings:  # noqa: B008 - frozen
    """Return a verdict for every floating-point addition in `graph`, which has example values."""
    return _Finder(graph, provenance, edges).run()


class _Finder(SumSplitter):
    def __init__(self, graph: Graph, provenance: Provenance, edges: BoundaryInfo) -> None:
        super().__init__(graph, provenance)
        self.edges = edges
        self.sites: list[Site] = []
        self.rejections: list[Rejection] = []
        self.decided: set[Node] = set()

    def run(self) -> Findings:
        # From the last add to the first, so that the outermost add of a sum tree is seen before its
        # parts.
        for node in reversed(self.candidates):
            if node not in self.decided:
                self._decide(node)
        return Findings(tuple(reversed(self.sites)), tuple(reversed(self.rejections)), self.aliases)

    def _decide(self, add: Node) -> None:
        adds, terms = flatten(add)
        verdict = self._judge(add, adds, terms)
        if isinstance(verdict, Rejection) and len(adds) > 1:
            # The whole sum is no site; its parts may be: `(x + f(x)) + memory`.
            adds = (add,)
            verdict = self._judge(add, adds, operands(add))
        self.decided.update(adds)
        if isinstance(verdict, Site):
            self.sites.append(verdict)
        else:
            self.rejections.append(verdict)

    def _judge(self, add: Node, adds: tuple[Node, ...], terms: tuple[Node, ...]) -> Site | Rejection:
        if op_name(add) in INPLACE_ADDS:
            return self.reject(
                add,
                Reason.MUTATED_OPERAND,
                lambda: f"'{add.args[0]}' is written in place and may be read again under another name",
            )
        split = self.split(add, terms)
        if isinstance(split, Rejection):
            tail = self._tail(add, adds, terms) if split.reason is Reason.INDEPENDENT and self.edges.inputs else None
            return split if tail is None else tail
        if (problem := self._shape_problem(add, terms, split)) is not None:
            return problem
        branch = self.dependence.between(split.trunk, split.others)
        streams = next((node for node in branch if is_update(node)), None)
        if streams is not None:
            return self.reject(add, Reason.REWRITTEN, lambda: f"its branch already runs on streams, '{streams}'")
        return self._written(add, split, branch) or self._site(add, adds, split, branch)

    def _tail(self, add: Node, adds: tuple[Node, ...], terms: tuple[Node, ...]) -> Site | Rejection | None:
        """Return the verdict on a sum whose branch began in another graph, or None."""
        for skip in terms:
            others = tuple(term for term in terms if term is not skip)
            if skip not in self.edges.inputs:
                continue
            behind = [sorted(closure([term], lambda node: node.all_input_nodes)) for term in others]
            foreign = tuple(tuple(node for node in nodes if node in self.edges.inputs) for nodes in behind)
            products = sorted(node for nodes in behind for node in nodes if contracts(node, self.weights))
            tail = self.edges.tail(add, skip, foreign, bool(products)) if all(foreign) else None
            if tail is None:
                continue
            if isinstance(tail, str):
                return self.reject(add, Reason.BROKEN_BRANCH, lambda tail=tail: tail)  # type: ignore[misc]
            return self._tail_site(add, adds, Split(skip, skip, others), tail, products)
        return None

    def _tail_site(
        self, add: Node, adds: tuple[Node, ...], split: Split, tail: BranchTail, products: list[Node]
    ) -> Site | Rejection:
        problem = self._shape_problem(add, (split.skip, *split.others), split) or self._written(add, split, ())
        if problem is not None:
            return problem
        total = known_tensor(add)
        axis = tail.axis + total.dim()
        width = _fixed(total.shape[axis])
        if width is None:
            return self.reject(add, Reason.DYNAMIC_WIDTH, lambda: f"axis {axis} of {describe(total)} has no fixed size")
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
            branch_outputs=split.others,
            branch=frozenset(),
            last_contraction=add,
            width=width,
            axis=axis,
            owner=owner,
            name=name,
            declaring_module=tail.owner,
            tail=True,
            heads=tail.heads,
        )

    def _shape_problem(self, add: Node, terms: tuple[Node, ...], split: Split) -> Rejection | None:
        total, skip = tensor_value(add), tensor_value(split.skip)
        shown = ", ".join(describe(value) for term in terms if (value := tensor_value(term)) is not None)
        if total is None or skip is None:
            return self.reject(add, Reason.DTYPE, lambda: "a term is not a tensor of known shape")
        if total.is_nested or skip.is_nested:
            return self.reject(add, Reason.TENSOR_SUBCLASS, lambda: f"the sum is a nested tensor, {describe(total)}")
        if not same_shape(skip, total):
            return self.reject(add, Reason.BROADCAST, lambda: f"the skip is broadcast: {shown}")
        if not total.dtype.is_floating_point:
            return self.reject(add, Reason.DTYPE, lambda: f"terms {shown} give {describe(total)}")
        if total.dim() < 2:
            return self.reject(
                add, Reason.NO_FEATURE_AXIS, lambda: f"terms {shown} have no token axis next to a feature axis"
            )
        return None

    def _written(self, add: Node, split: Split, branch: tuple[Node, ...]) -> Rejection | None:
        """Return the rejection of a site whose values are written where streams cannot follow."""
        victims = [(add, writer) for writer in self.aliases.writers(add)[:1]]
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
        return self.reject(add, Reason.MUTATED_OPERAND, lambda: f"'{victim}' is written in place by '{writer}'")

    def _site(self, add: Node, adds: tuple[Node, ...], split: Split, branch: tuple[Node, ...]) -> Site | Rejection:
        total = known_tensor(add)
        last = [node for node in branch if contracts(node, self.weights)][-1]
        shortcut = self._shortcut(split, branch, last)
        if shortcut is None:
            unknown = "neither the first reader of '{}' nor '{}' tells which axis of {} holds the features"
            return self.reject(add, Reason.FEATURE_AXIS, lambda: unknown.format(split.trunk, last, describe(total)))
        if isinstance(shortcut, str):
            return self.reject(add, Reason.PROJECTED_SKIP, lambda: shortcut)
        axis = shortcut.axes[split.trunk]
        shift = self._token_shift(add, split, shortcut, branch)
        if shift is not None:
            return shift
        trunk = known_tensor(split.trunk)
        width = _fixed(trunk.shape[axis])
        if width is None:
            return self.reject(add, Reason.DYNAMIC_WIDTH, lambda: f"axis {axis} of {describe(trunk)} has no fixed size")
        owner, child = common_owner(self.provenance.stack(add), self.provenance.stack(last))
        if owner is None:
            return self.reject(add, Reason.NO_OWNER, lambda: "the add is performed outside every module")
        name, declaring_module = self._name(owner, child, last)
        if declaring_module is None:
            own = "the branch ends in '{}', written with parameters of the compiled module itself; no module call can declare ours"
            return self.reject(add, Reason.NO_CARRIER, lambda: own.format(last))
        writers = self.aliases.writers(split.trunk)
        return Site(
            add=add,
            adds=adds,
            trunk=split.trunk,
            ready=writers[-1] if writers else split.trunk,
            skip=split.skip,
            shortcut=shortcut,
            branch_outputs=split.others,
            branch=frozenset(branch),
            last_contraction=last,
            width=width,
            axis=shortcut.axes[split.skip],
            owner=owner,
            name=name,
            declaring_module=declaring_module,
        )

    def _token_shift(self, add: Node, split: Split, shortcut: TrunkPath, branch: tuple[Node, ...]) -> Rejection | None:
        """Return the rejection of a sum whose branch only gates other tokens than the skip's.

        They come from the trunk, or into the graph: a decoder keeps the last token in a cache.
        """
        between = sorted({*shortcut.nodes, *branch}, key=self.order.__getitem__)
        term = shifted(split.trunk, between, split.skip, split.others, shortcut.axes[split.trunk])
        if term is not None:
            moved = "'{}' holds other tokens of '{}' than '{}' does, and nothing projects them"
            return self.reject(add, Reason.TOKEN_SHIFT, lambda: moved.format(term, split.trunk, split.skip))
        features = shortcut.axes[split.skip] - known_tensor(split.skip).dim()
        for term in split.others:
            value = self._gated(split.trunk, term, features)
            if value is not None:
                alone = f"'{value}' does not depend on '{split.trunk}'; only its gate does"
                return self.reject(add, Reason.INDEPENDENT, lambda alone=alone: alone)  # type: ignore[misc]
        return None

    def _gated(self, trunk: Node, term: Node, features: int) -> Node | None:
        """Return the activation that `term` scales, if `trunk` gives the scale of a token alone."""
        if op_name(term) != "mul" or len(factors := term.all_input_nodes) != 2:
            return None
        for gate, value in (factors, reversed(factors)):
            number, vector = tensor_value(gate), tensor_value(value)
            if number is None or vector is None or value in self.weights or min(number.dim(), vector.dim()) < -features:
                continue
            narrow = same_size(number.shape[features], 1) and not same_size(vector.shape[features], 1)
            if narrow and self.dependence.value(trunk, gate) and not self.dependence.at_all(trunk, value):
                return value
        return None

    def _shortcut(self, split: Split, branch: tuple[Node, ...], last: Node) -> TrunkPath | str | None:
        """Return the path to the skip, None without a feature axis, or what cannot be lifted."""
        output = max(split.others, key=self.order.__getitem__)
        entry, leaving = entry_axis(split.trunk, branch), exit_axis(last, output, branch)
        known = [axis for axis in (entry, leaving) if axis is not None and axis >= 0]
        if not known:
            return None
        trunk, skip = known_tensor(split.trunk), known_tensor(split.skip)
        if known[0] < trunk.dim():
            path = trunk_path_between(split.trunk, split.skip, known[0], self.aliases)
        else:
            path = Obstacle(split.trunk, f"it has no axis {known[0]}")
        if isinstance(path, Obstacle):
            why = f": {path}" if path.unexpected else ""
            return f"'{split.skip}' comes from the trunk '{split.trunk}' by operations that cannot run on streams{why}"
        if not same_size(trunk.shape[known[0]], skip.shape[path.axes[split.skip]]):
            return f"'{split.skip}' has another width than the trunk '{split.trunk}' that the branch reads"
        return path

    def _name(self, owner: ModuleRef, child: ModuleRef | None, last: Node) -> tuple[str, ModuleRef | None]:
        """Return the site's name below its owner, and the module whose call declares it.

        The name is the path of the module that ends the branch ("attn", "blocks.3"), or of the
        parameter if the owner itself performs the last contraction.
        """
        if child is not None:
            return _below(owner.path, child.path) or child.kind.lower(), child
        parameters = [self.provenance.parameter_name(source) for source in last.all_input_nodes]
        paths = [_below(owner.path, path) for path in parameters if path is not None]
        name = next((path for path in paths if path), "branch")
        return name, owner if owner.called else None


def _fixed(size: object) -> int | None:
    """Return a size as a number, else None. A norm's weights may have fixed a symbolic one."""
    return int(size) if isinstance(size, int) or (isinstance(size, torch.SymInt) and is_concrete_int(size)) else None


def _below(owner: str, path: str) -> str:
    """Return `path` relative to `owner`; "" if it lies elsewhere."""
    prefix = f"{owner}." if owner else ""
    return path.removeprefix(prefix) if path.startswith(prefix) else ""
