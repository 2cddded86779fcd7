"""One parameter of a hyper-connection from our layout to a native one and back, bit for bit.

phi   [n C, K]  columns pre (n), post (n), residual (n², row-major: H_res[i, j] is the weight of old stream j in new stream i)
fn    [K, n C]  phi transposed; where the system applies its matrix transposed, H_res = combᵀ, residual row (i, j) is our column (j, i)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.interop.layout import Kind

__all__ = ["UNUSED_SCALE", "convert", "order"]

#: a_res where H_res = I. Nothing reads it; this is what it starts from.
UNUSED_SCALE = 0.01


def order(streams: int, columns: int, *, transposed: bool) -> list[int]:
    """For every native logit the number of ours: its own inverse. `columns` is K; n + 0 columns are those of a read-out."""
    n = streams
    straight = list(range(columns))
    if not transposed or columns != 2 * n + n * n:
        return straight
    return straight[: 2 * n] + [2 * n + j * n + i for i in range(n) for j in range(n)]


def convert(value: Tensor, kind: Kind, *, streams: int, transposed: bool, native: bool, scales: int) -> Tensor:
    """`value` in the other layout, contiguous, of the same dtype.

    Args:
        value: phi [n C, K] or fn [K, n C]; bias or base [K]; scale [2] or [3], [1] of a read-out.
        kind: which of these.
        streams: n.
        transposed: whether the system applies its matrix transposed.
        native: to the native layout, rather than to ours.
        scales: how many scales the result has.
    """
    if kind == "same":
        return value
    if kind == "scales":
        if len(value) > scales:
            return value[:scales].contiguous()
        return (
            torch.cat([value, value.new_full((scales - len(value),), UNUSED_SCALE)]) if len(value) < scales else value
        )
    if kind == "logits":
        return value[order(streams, len(value), transposed=transposed)]
    if native:
        return value.t()[order(streams, value.shape[1], transposed=transposed)].contiguous()
    return value[order(streams, value.shape[0], transposed=transposed)].t().contiguous()
