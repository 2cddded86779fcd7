"""Kernels without a projection: `update`, `mix_read`, `close`, and their backwards.

Source: arXiv 2512.24880 v2, equation 3: `X' = H_res X + H_postᵀ y`. `mix_read` also writes
`h = Σ_j pre_j X'_j` for given weights; `close` gives the mean of the new streams, which are never
written. Elements moved a token: update 2 n C + C, its backward 3 n C + 2 C, and C more each with a
read; close n C + 2 C, its backward 2 n C + 3 C.

A program owns a block [B, W] of tokens and channels; where h has a norm all channels of its tokens,
over which it walks twice, so that the cache has what the second walk reads. Scalar products over
all channels are partial sums for each block of channels, [C / W, D, T], which `sums` adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_streams, mixed, wide
from .norm import denormed, load_moments, normed_h, read_streams, source_weights, store_gradients, times_gain


@triton.jit
def _place(block, tokens, width, block_tokens: tl.constexpr, block_channels: tl.constexpr):
    """Return the rows [B], the live ones, the channels [W] of a block, and the mask [B, W]."""
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    channels = block * block_channels + tl.arange(0, block_channels)
    live = rows < tokens
    return rows, live, channels, live[:, None] & (channels < width)[None, :]


@triton.jit
def _mix(
    streams, branch, post, res, pre, new_streams, read, block, tokens, width,
    n: tl.constexpr, m: tl.constexpr, reads: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute `update_kernel` for a block of channels, without a norm."""
    rows, live, channels, inside = _place(block, tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m, 0)
    blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if reads:
        pre_of = load_numbers(pre, rows, live, n)
        h = tl.zeros([block_tokens, block_channels], tl.float32)
    for i in tl.static_range(n):
        x = mixed(blocks, y, weights, mixing, i, m).to(new_streams.dtype.element_ty)
        tl.store(new_streams + rows[:, None] * (n * width) + i * width + channels[None, :], x, mask=inside)
        if reads:
            h += pre_of[i][:, None] * x.to(tl.float32)
    if reads:
        tl.store(read + at, h.to(read.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def update_kernel(
    streams, branch, post, res, pre, new_streams, read, tokens, width, gain, shift, moments, norm_eps,
    n: tl.constexpr, m: tl.constexpr, reads: tl.constexpr, norm: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mix `streams` [T, m, C] and `branch` [T, C] by `post` [T, n] and `res` [T, n, n].

    Where `reads` the new streams are read into `read` [T, C] with the weights `pre` [T, n]. With a
    `norm` `moments` [T, 2] are written.
    """
    if norm != "":
        for block in range(tl.cdiv(width, block_channels)):
            _mix(
                streams, branch, post, res, pre, new_streams, read, block, tokens, width,
                n, m, False, block_tokens, block_channels,
            )  # fmt: skip
        tl.debug_barrier()
        read_streams(
            (new_streams, branch, branch, branch), pre, post, res, read, gain, shift, moments,
            tl.program_id(0) * block_tokens, tokens, width, norm_eps,
            n, n, 0, False, norm, block_tokens, block_channels,
        )  # fmt: skip
    else:
        _mix(
            streams, branch, post, res, pre, new_streams, read, tl.program_id(1), tokens, width,
            n, m, reads, block_tokens, block_channels,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def close_kernel(
    streams, branch, post, res, mean, tokens, width,
    n: tl.constexpr, m: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Store `mean` [T, C] of the new streams: `Σ_l (Σ_i res_il / n) X_l + (Σ_i post_i / n) y`."""
    rows, live, channels, inside = _place(tl.program_id(1), tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m, 0)
    blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    total = mixed(blocks, y, weights, mixing, 0, m)
    for i in tl.static_range(1, n):
        total += mixed(blocks, y, weights, mixing, i, m)
    tl.store(mean + at, (total * (1.0 / n)).to(mean.dtype.element_ty), mask=inside)


@triton.jit
def _means(
    streams, grad_read, branch, post, res, pre, gain, moments, tokens, width,
    n: tl.constexpr, m: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Return the means over all channels of u and u x, two vectors [B]."""
    level = tl.zeros([block_tokens], tl.float32)
    along = tl.zeros([block_tokens], tl.float32)
    for block in range(tl.cdiv(width, block_channels)):
        rows, live, channels, inside = _place(block, tokens, width, block_tokens, block_channels)
        blocks = load_streams(streams, rows[:, None] * (m * width) + channels[None, :], inside, width, m)
        at = rows[:, None] * width + channels[None, :]
        blocks = blocks + (tl.load(branch + at, mask=inside, other=0.0),)
        weights = source_weights(pre, post, res, rows, live, n, m, 0, True)
        x = normed_h(blocks, weights, load_moments(moments, rows, live), m + 1)
        u = times_gain(tl.load(grad_read + at, mask=inside, other=0.0).to(tl.float32), gain, channels, width)
        level += tl.sum(u, 1)
        along += tl.sum(u * x, 1)
    return level / width, along / width


@triton.jit
def _update_backward(
    streams, grad, grad_read, branch, post, res, pre, d_streams, d_branch, partial, block, tokens, width,
    gain, shift, moments, d_norm, level, along,
    n: tl.constexpr, m: tl.constexpr, has_streams: tl.constexpr, has_read: tl.constexpr,
    reads: tl.constexpr, norm: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute `update_backward_kernel` for a block of channels, with given means."""
    rows, live, channels, inside = _place(block, tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m, 0)
    place = rows[:, None] * (m * width) + channels[None, :]
    blocks = load_streams(streams, place, inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if has_read:
        g_read = tl.load(grad_read + at, mask=inside, other=0.0).to(tl.float32)
        pre_of = load_numbers(pre, rows, live, n)
    if norm != "":
        moments_of = load_moments(moments, rows, live)
        x = normed_h(blocks + (y,), source_weights(pre, post, res, rows, live, n, m, 0, True), moments_of, m + 1)
        to = d_norm + wide(tl.program_id(0)) * (2 * width)
        store_gradients(to, g_read * x, g_read, gain, shift, channels, width)
        g_read = denormed(g_read, x, gain, channels, width, moments_of, level, along)

    count: tl.constexpr = n + n * m + (n if reads else 0)
    step = wide(tokens)
    out = partial + wide(block) * count * tokens + rows
    d_y = tl.zeros([block_tokens, block_channels], tl.float32)
    grads = ()
    for i in tl.static_range(n):
        g = tl.zeros([block_tokens, block_channels], tl.float32)
        if has_streams:
            to = rows[:, None] * (n * width) + i * width + channels[None, :]
            g = tl.load(grad + to, mask=inside, other=0.0).to(tl.float32)
        if has_read:
            x = mixed(blocks, y, weights, mixing, i, m).to(streams.dtype.element_ty).to(tl.float32)
            tl.store(out + (n + n * m + i) * step, tl.sum(g_read * x, 1), mask=live)
            g += pre_of[i][:, None] * g_read
        elif reads:
            tl.store(out + (n + n * m + i) * step, tl.zeros([block_tokens], tl.float32), mask=live)
        d_y += weights[i][:, None] * g
        tl.store(out + i * step, tl.sum(g * y, 1), mask=live)
        for l in tl.static_range(m):  # noqa: E741
            tl.store(out + (n + i * m + l) * step, tl.sum(g * blocks[l].to(tl.float32), 1), mask=live)
        grads = grads + (g,)
    tl.store(d_branch + at, d_y.to(d_branch.dtype.element_ty), mask=inside)
    for l in tl.static_range(m):  # noqa: E741
        d_x = tl.zeros([block_tokens, block_channels], tl.float32)
        for i in tl.static_range(n):
            d_x += mixing[i * m + l][:, None] * grads[i]
        tl.store(d_streams + place + l * width, d_x.to(d_streams.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def update_backward_kernel(
    streams, grad, grad_read, branch, post, res, pre, d_streams, d_branch, partial, tokens, width,
    gain, shift, moments, d_norm,
    n: tl.constexpr, m: tl.constexpr, has_streams: tl.constexpr, has_read: tl.constexpr,
    reads: tl.constexpr, norm: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute `dX_l = Σ_i res_il G_i`, `dy = Σ_i post_i G_i`, and scalar products.

    `G_i = g_i + pre_i g_read`, of which that is left out whose flag is not set; `grad` [T, n, C],
    `grad_read` [T, C]. `partial` [C / W, n + n m, T] float32: the parts of the n products
    `⟨G_i, y⟩`, then those of `⟨G_i, X_l⟩`, row-major; where `reads` n more, `⟨g_read, X'_i⟩`. With
    a `norm` g_read is dh, and `d_norm` [T / B, 2, C] float32 are parts of the gradients of gain and
    shift.
    """
    if norm != "":
        level, along = _means(
            streams, grad_read, branch, post, res, pre, gain, moments, tokens, width, n, m, block_tokens, block_channels
        )
        if norm == "rms":
            level = tl.zeros_like(level)
        for block in range(tl.cdiv(width, block_channels)):
            _update_backward(
                streams, grad, grad_read, branch, post, res, pre, d_streams, d_branch, partial, block, tokens, width,
                gain, shift, moments, d_norm, level, along,
                n, m, has_streams, has_read, reads, norm, block_tokens, block_channels,
            )  # fmt: skip
    else:
        _update_backward(
            streams, grad, grad_read, branch, post, res, pre, d_streams, d_branch, partial, tl.program_id(1),
            tokens, width, gain, shift, moments, d_norm, 0.0, 0.0,
            n, m, has_streams, has_read, reads, norm, block_tokens, block_channels,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def close_backward_kernel(
    streams, grad, branch, post, res, d_streams, d_branch, partial, tokens, width,
    n: tl.constexpr, m: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `close` for `grad` [T, C]: that of every new stream is `grad / n`.

    `partial` [C / W, 1 + m, T] float32: the parts of `⟨g / n, y⟩` and `⟨g / n, X_l⟩`.
    """
    rows, live, channels, inside = _place(tl.program_id(1), tokens, width, block_tokens, block_channels)
    weights = load_numbers(post, rows, live, n)
    mixing = load_mixing(res, rows, live, n, m, 0)
    place = rows[:, None] * (m * width) + channels[None, :]
    blocks = load_streams(streams, place, inside, width, m)
    at = rows[:, None] * width + channels[None, :]
    y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / n)

    step = wide(tokens)
    out = partial + wide(tl.program_id(1)) * (1 + m) * tokens + rows
    tl.store(out, tl.sum(g * y, 1), mask=live)
    weight = weights[0]
    for i in tl.static_range(1, n):
        weight += weights[i]
    tl.store(d_branch + at, (weight[:, None] * g).to(d_branch.dtype.element_ty), mask=inside)
    for l in tl.static_range(m):  # noqa: E741
        tl.store(out + (1 + l) * step, tl.sum(g * blocks[l].to(tl.float32), 1), mask=live)
        weight = mixing[l]
        for i in tl.static_range(1, n):
            weight += mixing[i * m + l]
        tl.store(d_streams + place + l * width, (weight[:, None] * g).to(d_streams.dtype.element_ty), mask=inside)
