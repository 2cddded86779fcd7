"""The sum of the partial results of another kernel, in a fixed order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def sums_kernel(
    partial, left, right, parts, rows, columns, left_width, right_width,
    left_step, base, inner, row_step, column_step,
    block_parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum `partial` [S, R, D] float32 over S, into `left` and `right` [R, width].

    Equal results are kept once in `partial`: entry e of the left is in column `e left_step`, e of
    the right in column `base + (e // inner) row_step + (e % inner) column_step`.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    width = left_width + right_width
    row = at // width
    entry = at % width
    live = row < rows
    lefts = entry < left_width
    other = entry - left_width
    column = tl.where(lefts, entry * left_step, base + (other // inner) * row_step + (other % inner) * column_step)
    part = tl.arange(0, block_parts).to(tl.int64)
    stride = tl.full([], 1, tl.int64) * rows * columns
    total = tl.zeros([block], tl.float32)
    for first in range(0, parts, block_parts):
        here = first + part
        mask = (here < parts)[:, None] & live[None, :]
        place = here[:, None] * stride + (row * columns + column)[None, :]
        total += tl.sum(tl.load(partial + place, mask=mask, other=0.0), 0)
    tl.store(left + row * left_width + entry, total.to(left.dtype.element_ty), mask=live & lefts)
    tl.store(right + row * right_width + other, total.to(right.dtype.element_ty), mask=live & (entry >= left_width))


def add_up(
    partial: Tensor, left: Tensor, right: Tensor, rows: int, columns: tuple[int, int], *, left_step: int = 1,
    base: int, inner: int = 1, row_step: int = 1, column_step: int = 1, tall: bool = False,
) -> None:  # fmt: skip
    """Launch `sums_kernel` for rows of `columns` = (left, right) results; `tall`: many parts."""
    block, block_parts = (32, 128) if tall else (128, 8)
    launch(
        sums_kernel, (triton.cdiv(rows * sum(columns), block),),
        partial, left, right, partial.shape[0], rows, partial.shape[-1], *columns,
        left_step, base, inner, row_step, column_step, block_parts=block_parts, block=block,
    )  # fmt: skip


def add_up_mixing(partial: Tensor, d_post: Tensor, d_res: Tensor, n: int, m: int) -> None:
    """Sum products [S, T, n + n m] into `d_post` [..., n] and `d_res` [..., n, n].

    The products of a stream that is held for n equal ones count for each.
    """
    add_up(
        partial, d_post, d_res, partial.shape[1], (n, n * n),
        base=n, inner=n, row_step=m, column_step=int(m == n and n > 1),
    )  # fmt: skip
