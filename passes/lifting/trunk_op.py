"""One trunk operation, and the interface of the rules that run it on streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import tensor_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.fx import Graph, Node


@dataclass(frozen=True)
class TrunkOp:
    """One trunk operation: its operands on the trunk, and the axes that hold their features."""

    node: Node
    operands: tuple[Node, ...]
    axes: Mapping[Node, int]
    value: Tensor
    before: Tensor

    @classmethod
    def of(cls, node: Node, operands: Iterable[Node], axes: Mapping[Node, int]) -> TrunkOp | None:
        """Return the operation, or None if its shapes are unknown."""
        listed = tuple(operands)
        value, before = tensor_value(node), tensor_value(listed[0])
        return None if value is None or before is None else cls(node, listed, axes, value, before)

    @property
    def axis(self) -> int:
        """The feature axis of the first operand."""
        return self.axes[self.operands[0]]

    @property
    def last(self) -> bool:
        """Whether the features lie on the last axis, as they do in the streams."""
        return self.axis == self.before.dim() - 1

    @property
    def others(self) -> list[Node]:
        """Operands that are not on the trunk."""
        return [argument for argument in self.node.all_input_nodes if argument not in self.operands]


@dataclass(frozen=True)
class Obstacle:
    """Why a trunk operation cannot run on streams."""

    node: Node
    reason: str
    #: Whether an exception gave the reason, so that a message should repeat it.
    unexpected: bool = False

    def __str__(self) -> str:
        return f"'{self.node}' cannot run on streams: {self.reason}"


class Rule(ABC):
    """How one kind of operation runs on streams."""

    @abstractmethod
    def axis(self, op: TrunkOp) -> int | Obstacle | None:
        """Return the feature axis of the result, or None if the rule does not apply."""

    @abstractmethod
    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        """Write the operation for streams before `before`."""
