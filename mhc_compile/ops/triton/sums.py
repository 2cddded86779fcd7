"""Adds up the partial sums that the programs of another kernel have left, in a fixed order: no atomics, the same bits every time.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sums_kernel"]


@triton.jit
def sums_kernel(
    partial, left, right, parts, rows, columns, left_width, right_width,
    left_step, base, inner, row_step, column_step,
    block_parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`partial` [S, R, D] float32 summed over S, into `left` [R, left_width] and `right` [R, right_width], of any dtype.

    Equal results are kept once in `partial`, so a result has to know its column: for entry e of the left `e left_step`, for entry e of the right
    `base + (e // inner) row_step + (e % inner) column_step`.
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
