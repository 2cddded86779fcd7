"""The forward kernel of a site: new streams, coefficients, and the input of the next branch.

Source: arXiv 2512.24880 v2, equations 3 to 9. A program owns a few tokens and walks over the
channels twice. First walk: load the streams (and mix and store them, if there is a branch), sum
squares and the thin projection. Between: sigmoids and Sinkhorn, in registers. Second walk: read the
new streams again, backwards, so that those still in the L2 cache come first, and write h. Elements
moved a token for n streams of width C: 2 n C + 2 C, and at most n C more after cache misses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_streams, mixed, pinned, product, sigmoid
from .launch import tuned
from .sinkhorn import res_logits, sinkhorn


@triton.jit
def _gather_z(
    raw, z, over_rms, rows, mask, column,
    columns: tl.constexpr, halves: tl.constexpr,
):  # fmt: skip
    """Return columns of `raw` [T, halves K], divided, and store them in `z` [T, K]."""
    at = rows * (halves * columns) + column
    value = tl.load(raw + at, mask=mask, other=0.0)
    if halves == 2:
        value += tl.load(raw + at + columns, mask=mask, other=0.0)
    value *= over_rms
    tl.store(z + rows * columns + column, value, mask=mask)
    return value


@triton.jit
def _coefficients(
    raw, bias, scale, over_rms, pre, post, res, z, rows, live, iterations,
    n: tl.constexpr, columns: tl.constexpr, halves: tl.constexpr, size: tl.constexpr, sinkhorn_mapping: tl.constexpr,
    block_tokens: tl.constexpr,
):  # fmt: skip
    """Store `pre`, `post` [T, n], `res` [T, n, n] and `z` [T, K] of the projection `raw`."""
    j = tl.arange(0, size)
    wanted = j < n
    row = rows[:, None]
    at = row * n + j[None, :]
    kept = live[:, None] & wanted[None, :]
    z_pre = _gather_z(raw, z, over_rms[:, None], row, kept, j[None, :], columns, halves)
    z_post = _gather_z(raw, z, over_rms[:, None], row, kept, n + j[None, :], columns, halves)
    b_pre = tl.load(bias + j, mask=wanted, other=0.0).to(tl.float32)
    b_post = tl.load(bias + n + j, mask=wanted, other=0.0).to(tl.float32)
    a_pre = tl.load(scale).to(tl.float32)
    a_post = tl.load(scale + 1).to(tl.float32)
    tl.store(pre + at, sigmoid(a_pre * z_pre + b_pre[None, :]), mask=kept)
    tl.store(post + at, 2.0 * sigmoid(a_post * z_post + b_post[None, :]), mask=kept)

    square = j[:, None] * n + j[None, :]
    real = wanted[:, None] & wanted[None, :]
    row = rows[:, None, None]
    every = live[:, None, None] & real[None]
    if sinkhorn_mapping:
        a_res = tl.load(scale + 2).to(tl.float32)
        z_res = _gather_z(raw, z, over_rms[:, None, None], row, every, 2 * n + square[None], columns, halves)
        matrix = sinkhorn(res_logits(z_res, bias + 2 * n, a_res, n, size), iterations)
    else:
        matrix = tl.where((j[:, None] == j[None, :])[None], 1.0, tl.zeros([block_tokens, size, size], tl.float32))
    tl.store(res + row * (n * n) + square[None], matrix, mask=every)


@tuned(["width", "n", "m", "mixes"], (16, 4, 2), (16, 8, 2), (32, 8, 2))
@triton.jit
def forward_kernel(
    streams, branch, post, res, phi, bias, scale,
    new_streams, read, new_pre, new_post, new_res, z, inverse, raw,
    tokens, width, iterations, eps,
    n: tl.constexpr, m: tl.constexpr, columns: tl.constexpr, halves: tl.constexpr, stride: tl.constexpr,
    size: tl.constexpr, thin: tl.constexpr,
    mixes: tl.constexpr, sinkhorn_mapping: tl.constexpr, precision: tl.constexpr, interpreted: tl.constexpr,
    block_channels: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Compute `step` where `mixes`, else `read`.

    In: `streams` [T, m, C]; with `mixes` also `branch` [T, C], `post` [T, n], `res` [T, n, n];
    `phi` [n C, stride], of which halves K columns are used (see `pack_kernel`); `bias` [K], `scale`
    [3]. Out: with `mixes` `new_streams` [T, n, C]; `read` [T, C]; float32 `new_pre`, `new_post`
    [T, n], `new_res` [T, n, n], `z` [T, K], `inverse` [T]. `raw` [T, halves K] is scratch memory.
    """
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    live = rows < tokens
    if mixes:
        weights = load_numbers(post, rows, live, n)
        mixing = load_mixing(res, rows, live, n, m)
    # How many streams there are to read.
    held: tl.constexpr = n if mixes else m

    k = tl.arange(0, thin)
    projection = tl.zeros([block_tokens, thin], tl.float32)
    squares = tl.zeros([block_tokens], tl.float32)
    for start in range(0, width, block_channels):
        channels = start + tl.arange(0, block_channels)
        wide = channels < width
        inside = live[:, None] & wide[None, :]
        blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
        if mixes:
            y = tl.load(branch + rows[:, None] * width + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        square = tl.zeros([block_tokens, block_channels], tl.float32)
        for i in tl.static_range(n):
            if mixes:
                x = mixed(blocks, y, weights, mixing, i, m).to(streams.dtype.element_ty)
                x = pinned(x, interpreted)
                tl.store(new_streams + rows[:, None] * (n * width) + i * width + channels[None, :], x, mask=inside)
            else:
                x = blocks[i % m]
            square += x.to(tl.float32) * x.to(tl.float32)
            at = (i * width + channels)[:, None] * stride + k[None, :]
            weight = tl.load(phi + at, mask=wide[:, None] & (k < halves * columns)[None, :], other=0.0)
            projection = product(x, weight, projection, precision)
        squares += tl.sum(square, 1)

    over_rms = tl.rsqrt(squares / (n * width) + eps)
    tl.store(inverse + rows, over_rms, mask=live)
    count: tl.constexpr = halves * columns
    tl.store(raw + rows[:, None] * count + k[None, :], projection, mask=live[:, None] & (k < count)[None, :])
    # From here on this program reads what its other threads have stored.
    tl.debug_barrier()
    _coefficients(
        raw, bias, scale, over_rms, new_pre, new_post, new_res, z, rows, live, iterations,
        n, columns, halves, size, sinkhorn_mapping, block_tokens,
    )  # fmt: skip
    tl.debug_barrier()

    source = streams
    if mixes:
        source = new_streams
    pre = load_numbers(new_pre, rows, live, n)
    for back in range(0, width, block_channels):
        channels = (tl.cdiv(width, block_channels) - 1) * block_channels - back + tl.arange(0, block_channels)
        inside = live[:, None] & (channels < width)[None, :]
        blocks = load_streams(source, rows[:, None] * (held * width) + channels[None, :], inside, width, held)
        h = tl.zeros([block_tokens, block_channels], tl.float32)
        for j in tl.static_range(n):
            h += pre[j][:, None] * blocks[j % held].to(tl.float32)
        tl.store(read + rows[:, None] * width + channels[None, :], h.to(read.dtype.element_ty), mask=inside)
