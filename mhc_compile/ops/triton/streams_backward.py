"""The second backward kernel of a site: one pass for all gradients that have the streams' width.

Source: the adjoint of arXiv 2512.24880 v2, equations 3 to 5. With the new streams X', computed
again from X and y, the gradient of X'_i is

    G_i = grad_X'_i + pre'_i grad_h + Σ_k s_k phi[i, c, k] − radial X'_i          s = dz / rms

and then `dX_l = Σ_i res_il G_i`, `dy = Σ_i post_i G_i`, `dpost_i = ⟨G_i, y⟩`,
`dres_il = ⟨G_i, X_l⟩`, `dphi[i, c, k] = Σ_t s_k X'_i`. Elements moved a token: 3 n C + 3 C.

A program owns a block of channels and a range of tokens. Its share of dphi stays in registers while
it walks over the tokens. Scalar products over all channels are partial sums for each block of
channels. `sums` adds both up.
"""
# ruff: noqa: RUF005 - the compiler takes `a + (b,)` only

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_streams, mixed, pinned, product, split
from .launch import tuned


@triton.jit
def _phi_rows(phi, channels, width, n: tl.constexpr, columns: tl.constexpr, thin: tl.constexpr):
    """Load n blocks [K, W] float32 of `phi` [n C, K], K padded with 0."""
    k = tl.arange(0, thin)[:, None]
    blocks = ()
    for i in tl.static_range(n):
        at = (i * width + channels)[None, :] * columns + k
        blocks = blocks + (
            tl.load(phi + at, mask=(channels < width)[None, :] & (k < columns), other=0.0).to(tl.float32),
        )
    return blocks


@triton.jit
def _inward(s, weight, total, halves: tl.constexpr, precision: tl.constexpr):
    """Compute `total + s @ weight`, [B, W], without the product of the fine halves."""
    if halves == 2:
        coarse, fine = split(s)
        weight_coarse, weight_fine = split(weight)
        total = product(fine, weight_coarse, total, precision)
        total = product(coarse, weight_fine, total, precision)
        return product(coarse, weight_coarse, total, precision)
    else:  # noqa: RET505 - the compiler wants one return a branch
        return product(s, weight, total, precision)


@triton.jit
def _outer(s, x, total, halves: tl.constexpr, precision: tl.constexpr):
    """Compute `total + sᵀ x`, [K, W] of [B, K] and [B, W]: a sum over tokens."""
    if halves == 2:
        coarse, fine = split(s)
        total = product(tl.trans(fine), x, total, precision)
        return product(tl.trans(coarse), x, total, precision)
    else:  # noqa: RET505
        return product(tl.trans(s), x, total, precision)


@triton.jit
def _from_matrix_unit(x, interpreted: tl.constexpr):
    """Return `x` [B, W] in another layout than that of a matrix unit's result.

    That layout spreads a token's channels over all warps: streams would be held twice, and every
    scalar product would wait at barriers. A gather, even of every number from its own place, makes
    the compiler choose the layout again.
    """
    if interpreted:
        return x
    else:  # noqa: RET505 - the compiler wants one return a branch
        return tl.gather(x, tl.broadcast_to(tl.arange(0, x.shape[1])[None, :], x.shape), 1)


@tuned(["width", "n", "m", "mixes"], (16, 8, 2), (16, 8, 1), (32, 8, 2))
@triton.jit
def streams_backward_kernel(
    grad_streams, grad_read, streams, branch, post, res, phi, new_pre, scaled, radial,
    d_streams, d_branch, partial, d_phi, tokens, width,
    n: tl.constexpr, m: tl.constexpr, columns: tl.constexpr, halves: tl.constexpr, thin: tl.constexpr, dots: tl.constexpr,
    mixes: tl.constexpr, has_streams: tl.constexpr, has_read: tl.constexpr, precision: tl.constexpr, interpreted: tl.constexpr,
    block_channels: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Compute the second half of `step_backward` where `mixes`, else of `read_backward`.

    In: `grad_streams` [T, n, C] and `grad_read` [T, C], if their flags are set; the forward's
    inputs; `scaled` [T, K] and `radial` [T]. Out: `d_streams` [T, m, C]; with `mixes` `d_branch`
    [T, C] and `partial` [C / W, T, n + n m] float32; `d_phi` [groups, n C, K] float32. Grid: blocks
    of channels, groups of tokens.
    """
    channels = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    wide = channels < width
    weights_of = _phi_rows(phi, channels, width, n, columns, thin)
    k = tl.arange(0, thin)
    d = tl.arange(0, dots)[None, :]
    count: tl.constexpr = n + n * m
    sums = ()
    for _i in tl.static_range(n):
        sums = sums + (tl.zeros([thin, block_channels], tl.float32),)

    each = tl.cdiv(tl.cdiv(tokens, block_tokens), tl.num_programs(1)) * block_tokens
    begin = tl.program_id(1) * each
    for start in range(begin, tl.minimum(begin + each, tokens), block_tokens):
        rows = (start + tl.arange(0, block_tokens)).to(tl.int64)
        live = rows < tokens
        inside = live[:, None] & wide[None, :]
        at = rows[:, None] * width + channels[None, :]
        place = rows[:, None] * (m * width) + channels[None, :]
        new_place = rows[:, None] * (n * width) + channels[None, :]
        s = tl.load(
            scaled + rows[:, None] * columns + k[None, :], mask=live[:, None] & (k < columns)[None, :], other=0.0
        )
        inward = tl.load(radial + rows, mask=live, other=0.0)
        blocks = load_streams(streams, place, inside, width, m)
        if has_read:
            g_read = tl.load(grad_read + at, mask=inside, other=0.0).to(tl.float32)
            pre = load_numbers(new_pre, rows, live, n)
        if mixes:
            y = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            post_of = load_numbers(post, rows, live, n)
            mixing = load_mixing(res, rows, live, n, m)
            d_y = tl.zeros([block_tokens, block_channels], tl.float32)
            products = tl.zeros([block_tokens, dots], tl.float32)
        d_x = ()
        for _l in tl.static_range(m):
            d_x = d_x + (tl.zeros([block_tokens, block_channels], tl.float32),)

        new_sums = ()
        for i in tl.static_range(n):
            if mixes:  # noqa: SIM108 - only a statement is decided while compiling
                x = mixed(blocks, y, post_of, mixing, i, m).to(streams.dtype.element_ty)
            else:
                x = blocks[i % m]
            x = pinned(x, interpreted)
            new_sums = new_sums + (_outer(s, x, sums[i], halves, precision),)
            g = _inward(s, weights_of[i], tl.zeros([block_tokens, block_channels], tl.float32), halves, precision)
            g = _from_matrix_unit(g, interpreted)
            g -= inward[:, None] * x.to(tl.float32)
            if has_streams:
                g += tl.load(grad_streams + new_place + i * width, mask=inside, other=0.0).to(tl.float32)
            if has_read:
                g += pre[i][:, None] * g_read
            new_d_x = ()
            for l in tl.static_range(m):  # noqa: E741
                if mixes:
                    products = tl.where(d == n + i * m + l, tl.sum(g * blocks[l].to(tl.float32), 1)[:, None], products)
                    new_d_x = new_d_x + (d_x[l] + mixing[i * m + l][:, None] * g,)
                elif i % m == l:
                    new_d_x = new_d_x + (d_x[l] + g,)
                else:
                    new_d_x = new_d_x + (d_x[l],)
            d_x = new_d_x
            if mixes:
                products = tl.where(d == i, tl.sum(g * y, 1)[:, None], products)
                d_y += post_of[i][:, None] * g
        sums = new_sums
        for l in tl.static_range(m):  # noqa: E741
            tl.store(d_streams + place + l * width, d_x[l].to(d_streams.dtype.element_ty), mask=inside)
        if mixes:
            tl.store(d_branch + at, d_y.to(d_branch.dtype.element_ty), mask=inside)
            to = (tl.program_id(0).to(tl.int64) * tokens + rows[:, None]) * count + d
            tl.store(partial + to, products, mask=live[:, None] & (d < count))

    own = d_phi + tl.program_id(1).to(tl.int64) * (n * width * columns)
    for i in tl.static_range(n):
        to = (i * width + channels)[None, :] * columns + k[:, None]
        tl.store(own + to, sums[i], mask=wide[None, :] & (k < columns)[:, None])
