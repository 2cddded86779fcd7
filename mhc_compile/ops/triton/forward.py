"""The forward kernel of a site: new streams, their coefficients, and the input of the next branch, in one launch.

Source: arXiv 2512.24880 v2, equations 3 to 9. A program owns a few tokens and walks over the channels twice. First walk: the streams are loaded (and
mixed and stored, when a branch's output goes in), squares and the thin projection are summed. Between: sigmoids and Sinkhorn, in registers.
Second walk: the new streams are read again, backwards, so that what was written last and still lies in the L2 cache is read first, and h is written.
Elements moved a token for n streams of width C: 2 n C + 2 C, and at most n C more where the cache has lost the streams.

Not yet run on a GPU; checked with Triton's interpreter.
"""
# ruff: noqa: RUF005 - the compiler takes `a + (b,)` only

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_streams, mixed, sigmoid, thin_product
from .launch import tuned
from .sinkhorn import load_res_logits, sinkhorn

__all__ = ["forward_kernel"]


@triton.jit
def _phi_block(phi, i, channels, wide, width, columns: tl.constexpr, thin: tl.constexpr):
    """Rows (i, channels) of `phi` [n C, K], [W, N] float32, padded with 0."""
    k = tl.arange(0, thin)
    at = (i * width + channels)[:, None] * columns + k[None, :]
    return tl.load(phi + at, mask=wide[:, None] & (k < columns)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _coefficients(
    z, bias, scale, pre, post, res, rows, live, iterations,
    n: tl.constexpr, columns: tl.constexpr, size: tl.constexpr, sinkhorn_mapping: tl.constexpr,
    block_tokens: tl.constexpr,
):  # fmt: skip
    """`pre`, `post` [T, n] and `res` [T, n, n] of the stored projection `z` [T, K]."""
    j = tl.arange(0, size)
    kept = live[:, None] & (j < n)[None, :]
    z_pre = tl.load(z + rows[:, None] * columns + j[None, :], mask=kept, other=0.0)
    z_post = tl.load(z + rows[:, None] * columns + n + j[None, :], mask=kept, other=0.0)
    b_pre = tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)
    b_post = tl.load(bias + n + j, mask=j < n, other=0.0).to(tl.float32)
    a_pre = tl.load(scale).to(tl.float32)
    a_post = tl.load(scale + 1).to(tl.float32)
    at = rows[:, None] * n + j[None, :]
    tl.store(pre + at, sigmoid(a_pre * z_pre + b_pre[None, :]), mask=kept)
    tl.store(post + at, 2.0 * sigmoid(a_post * z_post + b_post[None, :]), mask=kept)

    square = j[:, None] * n + j[None, :]
    real = (j < n)[:, None] & (j < n)[None, :]
    if sinkhorn_mapping:
        a_res = tl.load(scale + 2).to(tl.float32)
        logits = load_res_logits(z, bias, a_res, rows, live, n, columns, size)[0]
        matrix = sinkhorn(logits, iterations)
    else:
        matrix = tl.where((j[:, None] == j[None, :])[None], 1.0, 0.0) + tl.zeros([block_tokens, size, size], tl.float32)
    tl.store(res + rows[:, None, None] * (n * n) + square[None], matrix, mask=live[:, None, None] & real[None])


@tuned(["width", "n", "m", "mixes"], (16, 4), (16, 8), (32, 8))
@triton.jit
def forward_kernel(
    streams, branch, post, res, phi, bias, scale,
    new_streams, read, new_pre, new_post, new_res, z, inverse,
    tokens, width, iterations, eps,
    n: tl.constexpr, m: tl.constexpr, columns: tl.constexpr, size: tl.constexpr, thin: tl.constexpr,
    mixes: tl.constexpr, sinkhorn_mapping: tl.constexpr, precision: tl.constexpr,
    block_channels: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """`step` where `mixes`, else `read`.

    In: `streams` [T, m, C]; with `mixes` also `branch` [T, C], `post` [T, n], `res` [T, n, n]; `phi` [n C, K], `bias` [K], `scale` [3].
    Out: with `mixes` `new_streams` [T, n, C]; `read` [T, C]; float32 `new_pre`, `new_post` [T, n], `new_res` [T, n, n], `z` [T, K], `inverse` [T].
    """
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    live = rows < tokens
    if mixes:
        weights = load_numbers(post, rows, live, n)
        mixing = load_mixing(res, rows, live, n, m)
    # How many streams the statistics run over, and how often each counts.
    held: tl.constexpr = n if mixes else m
    copies: tl.constexpr = n // held

    projection = tl.zeros([block_tokens, thin], tl.float32)
    squares = tl.zeros([block_tokens, block_channels], tl.float32)
    for start in range(0, width, block_channels):
        channels = start + tl.arange(0, block_channels)
        wide = channels < width
        inside = live[:, None] & wide[None, :]
        at = rows[:, None] * width + channels[None, :]
        blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
        if mixes:
            y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(held):
            if mixes:
                x = mixed(blocks, y, weights, mixing, i, m).to(streams.dtype.element_ty)
                tl.store(new_streams + rows[:, None] * (n * width) + i * width + channels[None, :], x, mask=inside)
            else:
                x = blocks[i]
            squares += x.to(tl.float32) * x.to(tl.float32)
            weight = _phi_block(phi, i, channels, wide, width, columns, thin)
            for copy in tl.static_range(1, copies):
                weight += _phi_block(phi, copy, channels, wide, width, columns, thin)
            projection = thin_product(x, weight, projection, precision)

    mean = tl.sum(squares, 1) / (held * width)
    over_rms = tl.rsqrt(mean + eps)
    k = tl.arange(0, thin)
    tl.store(inverse + rows, over_rms, mask=live)
    tl.store(
        z + rows[:, None] * columns + k[None, :], projection * over_rms[:, None], mask=live[:, None] & (k < columns)[None, :]
    )
    # From here on this program reads what its other threads have stored.
    tl.debug_barrier()
    _coefficients(
        z, bias, scale, new_pre, new_post, new_res, rows, live, iterations, n, columns, size, sinkhorn_mapping, block_tokens
    )
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
