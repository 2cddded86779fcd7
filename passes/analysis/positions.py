"""Which positions of the trunk a value holds: its own tokens, or those that slices and rolls move.

A value that comes from the trunk without a contraction holds `trunk[p + offset]` at position p. A
slice adds its start to the offset; a pad, a place in a concatenation and a roll subtract theirs.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from mhc_compile.passes.analysis.feature_axis import argument, permutation
from mhc_compile.passes.analysis.op_info import (
    example_value,
    is_contraction,
    is_region,
    known_tensor,
    leaf_module,
    op_name,
    tensor_value,
)
from mhc_compile.passes.analysis.sum_terms import same_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.fx import Node

#: For each axis of a value the axis of the trunk that lies there, and the offset; NaN if unknown.
Image: TypeAlias = tuple[tuple[int, float], ...]
#: The axes along which an operation moves its operand's tokens, and how far.
Offsets: TypeAlias = dict[int, float]

_CATS = frozenset({"cat", "concat", "concatenate"})
_PADS = frozenset({"pad", "constant_pad_nd"})
_PAD_MODULES = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_SPLITS = frozenset("split chunk tensor_split split_with_sizes unsafe_split unsafe_chunk".split())
#: Their results hold tokens in an order that depends on data, or on a list.
_REORDERS = frozenset("flip gather index index_select take_along_dim scatter sort".split())


def shifted(trunk: Node, nodes: Iterable[Node], skip: Node, terms: Iterable[Node], features: int) -> Node | None:
    """Return the term that holds other tokens of `trunk` than `skip` at the same place, or None.

    Args:
        trunk: the value that the skip and the terms are computed from.
        nodes: the operations from it to the skip and the terms, in graph order.
        skip: the term of the sum that is the residual.
        terms: the other terms. Tokens that are projected or attended to belong to a branch wherever
            they stand, so contractions end the search; those of a gate do not matter.
        features: the trunk's feature axis. Along it nothing is compared.
    """
    found: dict[Node, set[Image]] = {trunk: {tuple((axis, 0) for axis in range(known_tensor(trunk).dim()))}}
    for node in nodes:
        if node in found or is_contraction(node) or is_region(node):
            continue
        images = {
            image
            for operand, offsets in _operands(node)
            for old in found.get(operand, ())
            if (image := _carry(old, offsets, operand, node)) is not None
        }
        if images:
            found[node] = images
    own = {axis: offset for image in found.get(skip, ()) for axis, offset in image if axis != features}

    def elsewhere(image: Image) -> bool:  # a difference from NaN is no evidence
        return any(abs(offset - own.get(axis, nan)) > 0 for axis, offset in image)

    return next((term for term in terms if any(map(elsewhere, found.get(term, ())))), None)


def _carry(image: Image, offsets: Offsets, operand: Node, node: Node) -> Image | None:
    """Return the image in `node` of what is `image` in its operand, None if the rank changes."""
    before, after = tensor_value(operand), tensor_value(node)
    if before is None or after is None:  # into the tuple of a split, and out of it
        offsets = dict.fromkeys(range(len(image)), 0) | offsets
    elif before.dim() != after.dim():
        return None
    elif (order := permutation(node, before.dim())) is not None:
        return tuple(image[axis] for axis in order)
    else:
        sizes = enumerate(zip(before.shape, after.shape, strict=True))
        offsets = {axis: 0 if same_size(*pair) else nan for axis, pair in sizes} | offsets
    return tuple((trunk, place + offsets[axis]) for axis, (trunk, place) in enumerate(image))


def _operands(node: Node) -> Iterator[tuple[Node, Offsets]]:
    """Yield the operands of `node`, each with the offsets that the operation adds."""
    name, operands = op_name(node), node.all_input_nodes
    value = tensor_value(operands[0]) if operands else None
    if name in _CATS:
        yield from _concatenated(node)
    elif name == "getitem" and value is None and op_name(operands[0]) in _SPLITS and isinstance(node.args[1], int):
        pieces: Any = example_value(operands[0])
        axis = int(argument(operands[0], 2, "dim", 0)) % pieces[0].dim()
        yield operands[0], {axis: sum(_number(piece.shape[axis]) for piece in pieces[: node.args[1]])}
    elif value is None:
        yield from ((operand, {}) for operand in operands)
    else:
        offsets = _moves(node, name, value)
        yield from ((operand, offsets) for operand in operands)


def _moves(node: Node, name: str, value: Tensor) -> Offsets:
    """Return the offsets of an operation on one tensor; none for those that keep places."""
    rank, module = value.dim(), leaf_module(node)
    if name == "getitem":
        return _indexed(node.args[1], value)
    if name in {"slice", "narrow"}:
        axis = int(argument(node, 1, "dim", 0)) % rank
        return {axis: _start(argument(node, 2, "start", 0), value.shape[axis])}
    if name in _PADS or isinstance(module, _PAD_MODULES):
        padding = module.padding if isinstance(module, _PAD_MODULES) else argument(node, 1, "pad")
        return {rank - 1 - place: -_number(before) for place, before in enumerate(_listed(padding)[::2])}
    if name == "roll":
        moves = zip(_listed(argument(node, 1, "shifts")), _listed(argument(node, 2, "dims")), strict=False)
        return {int(dim) % rank: -_number(shift) for shift, dim in moves}
    return dict.fromkeys(range(rank), nan) if name in _REORDERS else {}


def _concatenated(node: Node) -> Iterator[tuple[Node, Offsets]]:
    axis, place = int(argument(node, 1, "dim", node.kwargs.get("axis", 0))), 0.0
    for part in _listed(argument(node, 0, "tensors")):
        value = known_tensor(part)
        if value.dim() > 1 or value.numel():  # `cat` takes a vector without entries next to any shape
            yield part, {axis % value.dim(): -place}
            place += _number(value.shape[axis])


def _indexed(index: Any, value: Tensor) -> Offsets:
    """Return the offsets of `value[index]` for an index of slices; unknown for any other."""
    listed = list(index) if isinstance(index, tuple) else [index]
    if ... in listed:
        place = listed.index(...)
        listed[place : place + 1] = [slice(None)] * (value.dim() - len(listed) + 1)
    if not all(isinstance(entry, slice) for entry in listed):
        return dict.fromkeys(range(value.dim()), nan)
    pairs = enumerate(zip(listed, value.shape, strict=False))
    return {axis: _start(one.start, size) if one.step in (None, 1) else nan for axis, (one, size) in pairs}


def _listed(given: Any) -> list[Any]:
    """Return the entries of an argument; none if it is computed in the graph, or absent."""
    return [given] if isinstance(given, int) else list(given) if isinstance(given, (list, tuple)) else []


def _start(start: object, size: object) -> float:
    place = 0.0 if start is None else _number(start)
    return place + _number(size) if place < 0 else place


def _number(value: object) -> float:
    """Return a size or an index as a number, NaN if it is symbolic."""
    return float(value) if isinstance(value, int) else nan
