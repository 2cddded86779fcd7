"""The sums of the partial results of a backward kernel, each in a fixed order, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .blocks import filled, wide
from .launch import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ._shapes import Sizes


@triton.jit
def _sum(
    partial, out, program, parts, rows, columns, width, base, inner, row_step, column_step,
    tokens_last: tl.constexpr, block_parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum some entries of `partial` [S, R, D] float32 over S into `out` [R, width].

    Entry e is in column `base + (e // inner) row_step + (e % inner) column_step`: equal results are
    kept once in `partial`. With `tokens_last` it is [S, D, R].
    """
    at = wide(program) * block + tl.arange(0, block)
    live = at < wide(rows) * width
    if tokens_last:
        row = at % rows
        entry = at // rows
    else:
        row = at // width
        entry = at % width
    column = base + (entry // inner) * row_step + (entry % inner) * column_step
    part = tl.arange(0, block_parts).to(tl.int64)
    stride = wide(rows) * columns
    total = tl.zeros([block], tl.float32)
    for first in range(0, parts, block_parts):
        here = first + part
        mask = (here < parts)[:, None] & live[None, :]
        if tokens_last:
            place = here[:, None] * stride + (column * rows + row)[None, :]
        else:
            place = here[:, None] * stride + (row * columns + column)[None, :]
        total += tl.sum(tl.load(partial + place, mask=mask, other=0.0), 0)
    tl.store(out + row * width + entry, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _sum_mixing(
    products, before, d_res, program, parts, tokens, columns,
    n: tl.constexpr, m: tl.constexpr, block_parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sum up `⟨G_i, source_s⟩`; write `d_res[t, i, l] = Σ_s before[t, l, s] ⟨G_i, source_s⟩`.

    `before` [T, n, m] are what the sources weigh in the old streams. In `products` [S, D, T] the
    products are the entries after the first n.
    """
    at = wide(program) * block + tl.arange(0, block)
    live = at < wide(tokens) * n
    row, i = at % tokens, at // tokens
    part = tl.arange(0, block_parts).to(tl.int64)
    sums = filled(0.0, at.to(tl.float32), m)
    for first in range(0, parts, block_parts):
        here = first + part
        mask = (here < parts)[:, None] & live[None, :]
        new = ()
        for s in tl.static_range(m):
            place = here[:, None] * (wide(tokens) * columns) + ((n + i * m + s) * tokens + row)[None, :]
            new = new + (sums[s] + tl.sum(tl.load(products + place, mask=mask, other=0.0), 0),)
        sums = new
    for l in tl.static_range(n):  # noqa: E741
        total = tl.zeros([block], tl.float32)
        for s in tl.static_range(m):
            total += sums[s] * tl.load(before + row * (n * m) + l * m + s, mask=live, other=0.0)
        tl.store(d_res + row * (n * n) + i * n + l, total.to(d_res.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["blocks", "tokens", "groups", "rows", "tiles", "width", "norms"])
def sums_kernel(
    products, d_post, d_res, d_pre, phi_parts, d_phi, shares, d_bias, d_scale, blocks, tokens, groups, rows, tiles,
    norm_parts, d_gain, d_shift, width, norms, before,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, columns: tl.constexpr,
    mixes: tl.constexpr, mean: tl.constexpr, reads: tl.constexpr, projects: tl.constexpr,
):  # fmt: skip
    """Add up the results of the other backward kernels.

    `products` [blocks, D, T] are those of the kernels: with `mixes` the n products with the branch
    and the n m with the streams, with `mean` one and m, which count for every new stream; with
    `reads` n more, of d_pre. With `older` branches those with m sources, which weigh `before`
    [T, n, m] in the streams. With `projects` `phi_parts` [groups, n C, K] and `shares`
    [tiles, K + 3]. `norm_parts` [norms, 2, C] are those of gain and shift; an absent one is None.
    The products of a stream that is held for n equal ones count for each. Grid: `programs` of each.
    """
    program = tl.program_id(0)
    outer: tl.constexpr = 0 if mean else 1
    mixing: tl.constexpr = (1 + outer * (n - 1)) * (1 + m) if mixes else 0
    per_token: tl.constexpr = mixing + (n if reads else 0)
    along: tl.constexpr = 1 if m == n and n > 1 else 0
    if mixes:
        if program < tl.cdiv(tokens * n, 128):
            _sum(products, d_post, program, blocks, tokens, per_token, n, 0, 1, outer, 0, True, 8, 128)
        program -= tl.cdiv(tokens * n, 128)
        if older:
            if (program >= 0) & (program < tl.cdiv(tokens * n, 128)):
                _sum_mixing(products, before, d_res, program, blocks, tokens, per_token, n, m, 8, 128)
        elif (program >= 0) & (program < tl.cdiv(tokens * n * n, 128)):
            base: tl.constexpr = 1 + outer * (n - 1)
            _sum(products, d_res, program, blocks, tokens, per_token, n * n, base, n, outer * m, along, True, 8, 128)
        program -= tl.cdiv(tokens * n * n, 128)
    if reads:
        if (program >= 0) & (program < tl.cdiv(tokens * n, 128)):
            _sum(products, d_pre, program, blocks, tokens, per_token, n, mixing, 1, 1, 0, True, 8, 128)
        program -= tl.cdiv(tokens * n, 128)
    if projects:
        if (program >= 0) & (program < tl.cdiv(rows * columns, 128)):
            _sum(phi_parts, d_phi, program, groups, rows, columns, columns, 0, 1, 1, 0, False, 8, 128)
        program -= tl.cdiv(rows * columns, 128)
        if (program >= 0) & (program < tl.cdiv(columns, 32)):
            _sum(shares, d_bias, program, tiles, 1, columns + 3, columns, 0, 1, 1, 0, False, 128, 32)
        program -= tl.cdiv(columns, 32)
        if program == 0:
            _sum(shares, d_scale, program, tiles, 1, columns + 3, 3, columns, 1, 1, 0, False, 128, 32)
        program -= 1
    if d_gain is not None:
        if (program >= 0) & (program < tl.cdiv(width, 128)):
            _sum(norm_parts, d_gain, program, norms, 1, 2 * width, width, 0, 1, 1, 0, False, 8, 128)
        program -= tl.cdiv(width, 128)
    if d_shift is not None:  # noqa: SIM102 - a constant
        if program >= 0:
            _sum(norm_parts, d_shift, program, norms, 1, 2 * width, width, width, 1, 1, 0, False, 8, 128)


def programs(
    tokens: int, rows: int, n: int, columns: int, vectors: list[int], *, mixes: bool, reads: bool, projects: bool
) -> int:
    """Return the grid of `sums_kernel`; `vectors` are the sizes of d_gain and d_shift."""
    count = triton.cdiv(tokens * n, 128) + triton.cdiv(tokens * n * n, 128) if mixes else 0
    count += triton.cdiv(tokens * n, 128) if reads else 0
    count += triton.cdiv(rows * columns, 128) + triton.cdiv(columns, 32) + 1 if projects else 0
    return count + sum(int(triton.cdiv(size, 128)) for size in vectors)


def sum_up(
    x: Tensor, sizes: Sizes, mix: Sequence[Tensor], read_pre: Tensor | None, products: Tensor,
    site: tuple[Tensor, ...] = (), norm: tuple[Tensor | None, ...] = (None, None, None), before: Tensor | None = None,
    *, mean: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Add up the results of the other kernels; return `(d_post, d_res, d_pre, d_gain, d_shift)`.

    `site` is `(phi_parts, d_phi, shares, d_bias, d_scale)`, of which the second and the last two
    are written; `norm` is `(norm_parts, gain, shift)`; `before` is that of `sums_kernel`.
    """
    tokens, n = x.shape[0], sizes.n
    nothing = x.new_empty(0)
    d_post, d_res, d_pre = (
        nothing if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (*(mix[1:] or (None, None)), read_pre)
    )
    phi_parts, d_phi, shares, d_bias, d_scale = site or (nothing,) * 5
    rows = d_phi.shape[0] if site else 0
    norm_parts = nothing if norm[0] is None else norm[0]
    d_norm = [None if tensor is None else tensor.new_empty(tensor.shape) for tensor in norm[1:]]
    vectors = [tensor.numel() for tensor in d_norm if tensor is not None]
    flags = {"mixes": bool(mix), "reads": read_pre is not None, "projects": bool(site)}
    launch(
        sums_kernel, (programs(tokens, rows, n, sizes.columns, vectors, **flags),),
        products, d_post, d_res, d_pre, phi_parts, d_phi, shares, d_bias, d_scale,
        products.shape[0], tokens, phi_parts.shape[0] if site else 0, rows, shares.shape[0] if site else 0,
        norm_parts, *d_norm, sizes.width, norm_parts.shape[0], nothing if before is None else before,
        n=n, m=sizes.m, older=sizes.older, columns=sizes.columns, mean=mean, **flags, num_warps=4,
    )  # fmt: skip
    return d_post, d_res, d_pre, *(nothing if tensor is None else tensor for tensor in d_norm)
