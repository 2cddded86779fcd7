"""Recognises the norm of a value: a call of torch's, or a root mean square norm written out.

    torch  layer_norm(h, (C,), weight, bias, eps), rms_norm(h, (C,), weight, eps)
    by hand  x = h.float(); weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)

The second form is that of Llama and most models after it; casts may be anywhere or nowhere, the
factor a `rsqrt` or a division by a `sqrt`, and the weight anything [C], such as Gemma's `1 + w`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mhc_compile.passes.analysis.op_info import ADDS, CASTS, PRODUCTS, QUOTIENTS, op_name, tensor_value

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.fx import Graph

_SQUARES = frozenset({"pow", "__pow__", "square"})
_PARAMETERS = ("input", "normalized_shape", "weight", "bias", "eps")


@dataclass(frozen=True)
class Norm:
    """`kind` "rms" or "layer" with `gain` and `shift` [C], and the nodes that compute it."""

    kind: str
    gain: Node | None
    shift: Node | None
    eps: float
    nodes: tuple[Node, ...]  # the last one is the result

    @property
    def result(self) -> Node:
        """Return the normalised value."""
        return self.nodes[-1]


def kinds_in(graph: Graph) -> tuple[str, ...]:
    """Return the kinds of norms that a graph may have, at a glance."""
    names = {op_name(node) for node in graph.nodes}
    return (*(["layer"] if "layer_norm" in names else []), *(["rms"] if names & {"rms_norm", "rsqrt"} else []))


def norm_of(h: Node) -> Norm | None:
    """Return the norm that is the only reader of `h` [..., C], over C, in its dtype and place."""
    value = tensor_value(h)
    found = _called(h) or _written(h)
    if value is None or found is None:
        return None
    result = tensor_value(found.result)
    vectors = [tensor_value(one) for one in (found.gain, found.shift) if one is not None]
    width = value.shape[-1:]
    kind = value.dtype, value.device
    fits = result is not None and result.shape == value.shape and (result.dtype, result.device) == kind
    fits = fits and all(one is not None and one.shape == width and (one.dtype, one.device) == kind for one in vectors)
    return found if fits else None


def _called(h: Node) -> Norm | None:
    """Match a call of torch's."""
    (call, *more) = h.users
    kind = {"layer_norm": "layer", "rms_norm": "rms"}.get(op_name(call))
    if kind is None or more:
        return None
    names = _PARAMETERS if kind == "layer" else ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    value, shape, eps = (
        tensor_value(h),
        given.get("normalized_shape"),
        given.get("eps", None if kind == "rms" else 1e-5),
    )
    if given.get("input") is not h or value is None or not isinstance(shape, tuple | list) or len(shape) != 1:
        return None
    if eps is None and value.dtype in (torch.float32, torch.float64):  # else it differs between versions of torch
        eps = torch.finfo(value.dtype).eps
    vectors = given.get("weight"), given.get("bias")
    if not isinstance(eps, float) or not all(one is None or isinstance(one, Node) for one in vectors):
        return None
    return Norm(kind, *vectors, eps, (call,))


def _written(h: Node) -> Norm | None:
    """Match a root mean square norm that is written out."""
    taken: list[Node] = []

    def step(node: Node | None, names: Collection[str], *, users: int = 1) -> Node | None:
        """Take the reader of `node` with one of these names, which must have so many readers."""
        found = [user for user in node.users if op_name(user) in names] if node is not None else []
        if len(found) != 1 or len(found[0].users) != users:
            return None
        taken.append(found[0])
        return found[0]

    x = h
    while (cast := next((user for user in x.users if op_name(user) in CASTS and user.args[0] is x), None)) is not None:
        others = [user for user in x.users if user is not cast]
        if any(not _is_example(user, x) for user in others) or _narrows(x, cast):
            return None
        taken.append(cast)
        x = cast
    square = _square_of(x)
    product = next((user for user in x.users if user is not square), None)
    if square is None or product is None or len(x.users) != 2 or len(square.users) != 1:
        return None
    taken.append(square)
    mean = step(square, {"mean"})
    total = step(mean, ADDS)
    root = step(total, {"rsqrt", "sqrt"})
    if mean is None or total is None or root is None or not _is_over_features(mean):
        return None
    eps = next((one for one in total.args if one is not mean), None)
    operands = (x, root)
    if op_name(root) == "rsqrt":
        fits = op_name(product) in PRODUCTS and product.args in (operands, operands[::-1])
    else:
        fits = op_name(product) in QUOTIENTS and product.args == operands
    if not fits or not isinstance(eps, float) or total.kwargs or product.kwargs:
        return None
    taken.append(product)
    gain = _weight_after(product, h, taken)
    if len(h.users) > 1 and not all(user in taken for user in h.users):
        return None
    return Norm("rms", gain, None, eps, tuple(taken))


def _weight_after(last: Node, h: Node, taken: list[Node]) -> Node | None:
    """Take the casts and the multiplication that follow, to the last in the dtype of `h`."""
    gain, found, fits = None, None, len(taken)
    while len(last.users) == 1:
        (user,) = last.users
        if gain is None and op_name(user) in PRODUCTS and not user.kwargs:
            (gain,) = [one for one in user.args if one is not last] or (None,)
            weight = tensor_value(gain) if isinstance(gain, Node) else None
            if weight is None or weight.dim() != 1:
                break
        elif op_name(user) not in CASTS or user.args[0] is not last:
            break
        taken.append(user)
        last = user
        if _dtype(last) == _dtype(h):
            fits, found = len(taken), gain
    del taken[fits:]
    return found  # type: ignore[return-value]


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_value(node)
    return None if value is None else value.dtype


def _is_example(user: Node, x: Node) -> bool:
    """Return whether `user` asks `x` for its dtype alone."""
    return op_name(user) == "type_as" and user.args[0] is not x


def _narrows(x: Node, cast: Node) -> bool:
    before, after = _dtype(x), _dtype(cast)
    return before is None or after is None or torch.promote_types(before, after) != after


def _square_of(x: Node) -> Node | None:
    for user in x.users:
        name = op_name(user)
        if name == "square" or (name in _SQUARES and user.args[1:] == (2,)):
            return user
        if name in PRODUCTS and user.args == (x, x):
            return user
    return None


def _is_over_features(mean: Node) -> bool:
    given = {**dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)), **mean.kwargs}
    given.pop("input", None)
    return given.pop("dim", None) in (-1, (-1,), [-1]) and given.pop("keepdim", False) is True and not given
