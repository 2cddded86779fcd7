"""Kernels that mix and read nothing: `update`, `close`, and their backwards.

Source: arXiv 2512.24880 v2, equation 3: `X' = H_res X + H_postᵀ y`. `close` gives the mean of the
new streams, which are never written. Elements moved a token: update 2 n C + C, its backward 3 n C +
2 C; close n C + 2 C, its backward 2 n C + 3 C.

A program owns a block [B, W] of tokens and channels. Scalar products over all channels are partial
sums for each block of channels, [C / W, T, D], which `sums` adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_streams, mixed


@triton.jit
def _place(tokens, width, block_tokens: tl.constexpr, block_channels: tl.constexpr):
    """Return the rows [B], the live ones, the channels [W], and the mask [B, W] of this program."""
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    live = rows < tokens
    return rows, live, channels, live[:, None] & (channels < width)[None, :]


@triton.jit
def update_kernel(
    streams, branch, post, res, new_streams, tokens, width,
    n: tl.constexpr, m: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mix `streams` [T, m, C] and `branch` [T, C] by `post` [T, n] and `res` [T, n, n]."""
    rows, live, channels, inside = _place(tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m)
    blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
    y = tl.load(branch + rows[:, None] * width + channels[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(n):
        x = mixed(blocks, y, weights, mixing, i, m).to(new_streams.dtype.element_ty)
        tl.store(new_streams + rows[:, None] * (n * width) + i * width + channels[None, :], x, mask=inside)


@triton.jit
def close_kernel(
    streams, branch, post, res, mean, tokens, width,
    n: tl.constexpr, m: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Store `mean` [T, C] of the new streams: `Σ_l (Σ_i res_il / n) X_l + (Σ_i post_i / n) y`."""
    rows, live, channels, inside = _place(tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m)
    blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    total = mixed(blocks, y, weights, mixing, 0, m)
    for i in tl.static_range(1, n):
        total += mixed(blocks, y, weights, mixing, i, m)
    tl.store(mean + at, (total * (1.0 / n)).to(mean.dtype.element_ty), mask=inside)


@triton.jit
def update_backward_kernel(
    grad, streams, branch, post, res, d_streams, d_branch, partial, tokens, width,
    n: tl.constexpr, m: tl.constexpr, dots: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute `dX_l = Σ_i res_il g_i`, `dy = Σ_i post_i g_i`, and products for `grad` [T, n, C].

    `partial` [C / W, T, n + n m] float32: the parts of the n products `⟨g_i, y⟩`, then those of
    `⟨g_i, X_l⟩`, row-major. `dots` is the padded D.
    """
    rows, live, channels, inside = _place(tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m)
    place = rows[:, None] * (m * width) + channels[None, :]
    blocks = load_streams(streams, place, inside, width, m)
    grads = load_streams(grad, rows[:, None] * (n * width) + channels[None, :], inside, width, n)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)

    d = tl.arange(0, dots)[None, :]
    products = tl.zeros([block_tokens, dots], tl.float32)
    d_y = tl.zeros([block_tokens, block_channels], tl.float32)
    for i in tl.static_range(n):
        g = grads[i].to(tl.float32)
        d_y += weights[i][:, None] * g
        products = tl.where(d == i, tl.sum(g * y, 1)[:, None], products)
        for l in tl.static_range(m):  # noqa: E741
            products = tl.where(d == n + i * m + l, tl.sum(g * blocks[l].to(tl.float32), 1)[:, None], products)
    tl.store(d_branch + at, d_y.to(d_branch.dtype.element_ty), mask=inside)
    for l in tl.static_range(m):  # noqa: E741
        d_x = tl.zeros([block_tokens, block_channels], tl.float32)
        for i in tl.static_range(n):
            d_x += mixing[i * m + l][:, None] * grads[i].to(tl.float32)
        tl.store(d_streams + place + l * width, d_x.to(d_streams.dtype.element_ty), mask=inside)
    count: tl.constexpr = n + n * m
    to = (tl.program_id(1).to(tl.int64) * tokens + rows[:, None]) * count + d
    tl.store(partial + to, products, mask=live[:, None] & (d < count))


@triton.jit
def close_backward_kernel(
    grad, streams, branch, post, res, d_streams, d_branch, partial, tokens, width,
    n: tl.constexpr, m: tl.constexpr, dots: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `close` for `grad` [T, C]: that of every new stream is `grad / n`.

    `partial` [C / W, T, 1 + m] float32: the parts of `⟨g / n, y⟩` and `⟨g / n, X_l⟩`.
    """
    rows, live, channels, inside = _place(tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m)
    place = rows[:, None] * (m * width) + channels[None, :]
    blocks = load_streams(streams, place, inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / n)

    d = tl.arange(0, dots)[None, :]
    products = tl.where(d == 0, tl.sum(g * y, 1)[:, None], tl.zeros([block_tokens, dots], tl.float32))
    weight = weights[0]
    for i in tl.static_range(1, n):
        weight += weights[i]
    tl.store(d_branch + at, (weight[:, None] * g).to(d_branch.dtype.element_ty), mask=inside)
    for l in tl.static_range(m):  # noqa: E741
        products = tl.where(d == 1 + l, tl.sum(g * blocks[l].to(tl.float32), 1)[:, None], products)
        weight = mixing[l]
        for i in tl.static_range(1, n):
            weight += mixing[i * m + l]
        tl.store(d_streams + place + l * width, (weight[:, None] * g).to(d_streams.dtype.element_ty), mask=inside)
    count: tl.constexpr = 1 + m
    to = (tl.program_id(1).to(tl.int64) * tokens + rows[:, None]) * count + d
    tl.store(partial + to, products, mask=live[:, None] & (d < count))
