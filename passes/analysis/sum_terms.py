"""The terms of a sum: which adds form one sum, and where each term comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mhc_compile.passes.analysis.op_info import ADDS, INPLACE_ADDS, is_contraction, op_name, passes_value, tensor_value

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

#: How many operations a shortcut may have. The longest in the zoo has four.
SHORTCUT = 8


def is_candidate(node: Node) -> bool:
    """Return whether the node adds two floating-point or complex tensors."""
    if op_name(node) not in ADDS | INPLACE_ADDS:
        return False
    value = tensor_value(node)
    numbers = value is not None and (value.dtype.is_floating_point or value.dtype.is_complex)
    return numbers and len(operands(node)) == 2


def is_parameter(node: Node) -> bool:
    """Return whether the node itself shows that it is a parameter."""
    return node.op == "get_attr" or (node.op == "placeholder" and isinstance(tensor_value(node), torch.nn.Parameter))


def product_behind(term: Node) -> Node | None:
    """Return the first contraction among `term` and the values that it cheaply comes from."""
    node: Node | None = term
    for _ in range(SHORTCUT + 1):
        if node is None or is_contraction(node):
            return node
        node = carried(node)
    return None


def carried(node: Node) -> Node | None:
    """Return the operand whose value a cheap operation passes on, or None for a contraction.

    That is its only floating-point tensor, or the only one of the result's shape.
    """
    if node.op not in {"call_function", "call_method", "call_module"} or is_contraction(node) or not passes_value(node):
        return None
    if op_name(node) == "neg":  # `f(x) - x` is a difference, and no residual add
        return None
    values = [
        operand
        for operand in node.all_input_nodes
        if (value := tensor_value(operand)) is not None and value.is_floating_point() and not is_parameter(operand)
    ]
    if len(values) > 1:
        values = [operand for operand in values if same_shape(tensor_value(operand), tensor_value(node))]
    return values[0] if len(values) == 1 else None


def operands(node: Node) -> tuple[Node, ...]:
    """Return the two tensors of a normalised addition."""
    return tuple(argument for argument in node.args[:2] if isinstance(argument, torch.fx.Node))


def flatten(add: Node) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return the adds, `add` last, and the terms of the sum tree that ends in `add`.

    Inner sums are read by this tree alone.
    """
    if op_name(add) in INPLACE_ADDS:
        return (add,), operands(add)
    adds: list[Node] = []
    terms: list[Node] = []
    stack = [add]
    while stack:
        node = stack.pop()
        adds.append(node)
        for term in operands(node):
            whole = op_name(term) in ADDS and is_candidate(term) and len(term.users) == 1
            inner = whole and same_shape(tensor_value(term), tensor_value(node))
            (stack if inner else terms).append(term)
    return tuple(reversed(adds)), tuple(terms)


def same_shape(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two shapes are known to be equal. Equal symbols need not look alike."""
    if one is None or other is None or one.dim() != other.dim():
        return False
    return all(same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))


def same_size(one: object, other: object) -> bool:
    """Return whether two sizes are known to be equal."""
    return statically_known_true(one == other)


def describe(value: Tensor) -> str:
    """Return shape and dtype as text, for messages."""
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return f"{sizes} {str(value.dtype).removeprefix('torch.')}"
