"""The first backward kernel of a site: the gradient of the projection.

Source: the chain rule on arXiv 2512.24880 v2, equations 5 to 9, as in
`mhc_compile.ops.reference.coefficients_backward`. A program owns a few tokens. It walks over the
channels once for the scalar products of `grad_h` with the streams (n C + 2 C elements a token),
then passes the gradients of pre, post and res back through sigmoids and Sinkhorn, in registers. The
new streams are not read: with `X'_j = Σ_l res_jl X_l + post_j y` their products are mixed from
those of the old streams.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sinkhorn import res_logits, sinkhorn_backward


@triton.jit
def _read_gradient(
    grad_read, streams, branch, post, res, rows, live, width,
    n: tl.constexpr, m: tl.constexpr, size: tl.constexpr, held: tl.constexpr, mixes: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """`d_pre_j = ⟨grad_h, X'_j⟩`, [B, N] float32. `held` is m padded to a power of two."""
    l = tl.arange(0, held)  # noqa: E741
    j = tl.arange(0, size)
    with_streams = tl.zeros([block_tokens, held], tl.float32)
    with_branch = tl.zeros([block_tokens], tl.float32)
    for start in range(0, width, block_channels):
        channels = start + tl.arange(0, block_channels)
        wide = channels < width
        inside = live[:, None] & wide[None, :]
        at = rows[:, None] * width + channels[None, :]
        g = tl.load(grad_read + at, mask=inside, other=0.0).to(tl.float32)
        place = rows[:, None, None] * (m * width) + l[None, :, None] * width + channels[None, None, :]
        x = tl.load(streams + place, mask=inside[:, None, :] & (l < m)[None, :, None], other=0.0).to(tl.float32)
        with_streams += tl.sum(x * g[:, None, :], 2)
        if mixes:
            with_branch += tl.sum(g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32), 1)
    if m == 1:
        product = tl.sum(with_streams, 1)
    if mixes:
        kept = live[:, None] & (j < n)[None, :]
        weight = tl.load(post + rows[:, None] * n + j[None, :], mask=kept, other=0.0).to(tl.float32)
        old = tl.arange(0, size)
        place = rows[:, None, None] * (n * n) + j[None, :, None] * n + old[None, None, :]
        mixing = tl.load(res + place, mask=kept[:, :, None] & (old < n)[None, None, :], other=0.0).to(tl.float32)
        if m == 1:  # noqa: SIM108 - only a statement is decided while compiling
            total = tl.sum(mixing, 2) * product[:, None]
        else:
            total = tl.sum(mixing * with_streams[:, None, :], 2)
        return total + weight * with_branch[:, None]
    elif m == 1:  # noqa: RET505 - the compiler wants one return a branch
        return product[:, None] + tl.zeros([1, size], tl.float32)
    else:
        return with_streams


@triton.jit
def coefficients_backward_kernel(
    grad_read, grad_post, grad_res, streams, branch, post, res, bias, scale, new_pre, new_post, z, inverse,
    scaled, radial, partial, sums, tokens, width, iterations,
    n: tl.constexpr, m: tl.constexpr, columns: tl.constexpr, size: tl.constexpr, held: tl.constexpr,
    mixes: tl.constexpr, has_read: tl.constexpr, has_post: tl.constexpr, has_res: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Compute `scaled`, `radial` and `partial`.

    In: `grad_read` [T, C], `grad_post` [T, n], `grad_res` [T, n, n], if their flags are set; the
    forward's inputs and results. Out, float32: `scaled` [T, K] = dz / rms; `radial` [T], the factor
    of X' in its own gradient; `partial` [T / B, K + 3], this program's share of d_bias and d_scale.
    `sums` [iterations - 1, 2, T, n] is scratch memory of Sinkhorn.
    """
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    live = rows < tokens
    j = tl.arange(0, size)
    kept = live[:, None] & (j < n)[None, :]
    at = rows[:, None] * n + j[None, :]
    at_z = rows[:, None] * columns + j[None, :]
    own = partial + tl.program_id(0) * (columns + 3)
    over_rms = tl.load(inverse + rows, mask=live, other=0.0)

    d_pre = tl.zeros([block_tokens, size], tl.float32)
    if has_read:
        pre = tl.load(new_pre + at, mask=kept, other=0.0)
        d_pre = pre * (1.0 - pre) * _read_gradient(
            grad_read, streams, branch, post, res, rows, live, width, n, m, size, held, mixes,
            block_tokens, block_channels,
        )  # fmt: skip
    z_pre = tl.load(z + at_z, mask=kept, other=0.0)
    a_pre = tl.load(scale).to(tl.float32)
    tl.store(scaled + at_z, d_pre * a_pre * over_rms[:, None], mask=kept)
    tl.store(own + j, tl.sum(d_pre, 0), mask=j < n)
    turn = tl.sum(d_pre * z_pre, 1)
    tl.store(own + columns, tl.sum(turn, 0))
    along = a_pre * turn

    d_post = tl.zeros([block_tokens, size], tl.float32)
    if has_post:
        value = tl.load(new_post + at, mask=kept, other=0.0)
        d_post = value * (1.0 - 0.5 * value) * tl.load(grad_post + at, mask=kept, other=0.0).to(tl.float32)
    z_post = tl.load(z + at_z + n, mask=kept, other=0.0)
    a_post = tl.load(scale + 1).to(tl.float32)
    tl.store(scaled + at_z + n, d_post * a_post * over_rms[:, None], mask=kept)
    tl.store(own + n + j, tl.sum(d_post, 0), mask=j < n)
    turn = tl.sum(d_post * z_post, 1)
    tl.store(own + columns + 1, tl.sum(turn, 0))
    along += a_post * turn

    if columns > 2 * n:
        a_res = tl.load(scale + 2).to(tl.float32)
        square = j[:, None] * n + j[None, :]
        real = (j < n)[:, None] & (j < n)[None, :]
        every = live[:, None, None] & real[None]
        at_z_res = rows[:, None, None] * columns + 2 * n + square[None]
        z_res = tl.load(z + at_z_res, mask=every, other=0.0)
        d_res = tl.zeros([block_tokens, size, size], tl.float32)
        if has_res:
            place = rows[:, None, None] * (n * n) + square[None]
            grad = tl.load(grad_res + place, mask=every, other=0.0).to(tl.float32)
            logits = res_logits(z_res, bias + 2 * n, a_res, n, size)
            d_res = sinkhorn_backward(grad, logits, sums, rows, live, tokens, iterations, n, size)
        tl.store(scaled + at_z_res, d_res * a_res * over_rms[:, None, None], mask=every)
        tl.store(own + 2 * n + square, tl.sum(d_res, 0), mask=real)
        turn = tl.sum(tl.sum(d_res * z_res, 2), 1)
        tl.store(own + columns + 2, tl.sum(turn, 0))
        along += a_res * turn
    else:
        tl.store(own + columns + 2, 0.0)
    tl.store(radial + rows, over_rms * over_rms * along / (n * width), mask=live)
