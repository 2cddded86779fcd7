"""One parameter of a hyper-connection from our layout to a native one and back, bit for bit.

phi   [n C, K]  columns pre (n), post (n), residual (n², row-major: H_res[i, j] is the weight of old stream j in new stream i)
fn    [K, n C]  phi transposed; where the system applies its matrix transposed, H_res = combᵀ, residual row (i, j) is our column (j, i)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["UNUSED_SCALE", "across", "resized", "turned"]

#: a_res where H_res = I. Nothing reads it; this is what it starts from.
UNUSED_SCALE = 0.01


def turned(values: Sequence[Tensor], part: tuple[int, int] | None) -> Tensor:
    """Projections transposed, [a, b] to [b, a]: several side by side, or of one only the columns of `part`."""
    if part is not None:
        return values[0][:, part[0] : part[1]].t().contiguous()
    return torch.cat([value.t() for value in values], dim=1) if len(values) > 1 else values[0].t().contiguous()


def across(value: Tensor, streams: int, axis: int) -> Tensor:
    """`value` with the n² residual logits on `axis`, which stand behind 2n others, in each other's place: (i, j) becomes (j, i)."""
    n = streams
    order = [*range(2 * n), *(2 * n + j * n + i for i in range(n) for j in range(n))]
    return value.index_select(axis, torch.tensor(order, device=value.device))


def resized(value: Tensor, count: int) -> Tensor:
    """The first `count` scales; what there are too few of has the value `UNUSED_SCALE`."""
    if len(value) >= count:
        return value[:count].clone()
    return torch.cat([value, value.new_full((count - len(value),), UNUSED_SCALE)])
