"""Launches the sum of partial results: see `sums`.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from .launch import launch
from .sums import sums_kernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_up", "add_up_mixing"]


def add_up(
    partial: Tensor, left: Tensor, right: Tensor, rows: int, columns: tuple[int, int], *, left_step: int = 1,
    base: int, inner: int = 1, row_step: int = 1, column_step: int = 1, tall: bool = False,
) -> None:  # fmt: skip
    """Launch `sums_kernel` for `rows` rows of `columns` = (left, right) results. `tall`: few results of many parts each."""
    block, block_parts = (32, 128) if tall else (128, 8)
    launch(
        sums_kernel, (triton.cdiv(rows * sum(columns), block),),
        partial, left, right, partial.shape[0], rows, partial.shape[-1], *columns,
        left_step, base, inner, row_step, column_step, block_parts=block_parts, block=block,
    )  # fmt: skip


def add_up_mixing(partial: Tensor, d_post: Tensor, d_res: Tensor, n: int, m: int) -> None:
    """Partial products [S, T, n + n m] to `d_post` [..., n] and `d_res` [..., n, n]. One held stream stands for n: its products count for each."""
    add_up(
        partial, d_post, d_res, partial.shape[1], (n, n * n),
        base=n, inner=n, row_step=m, column_step=int(m == n and n > 1),
    )  # fmt: skip
