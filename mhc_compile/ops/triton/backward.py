"""The backward kernel of a site.

Source: the adjoint of arXiv 2512.24880 v2, equations 3 to 9. With the new streams X', computed
again from X and y, and s = dz / rms the gradient of the projection, that of X'_i is

    G_i = grad_X'_i + pre_i grad_h + Σ_k s_k phi[i, c, k] − radial X'_i

and then `dX_l = Σ_i res_il G_i`, `dy = Σ_i post_i G_i`, `dpost_i = ⟨G_i, y⟩`,
`dres_il = ⟨G_i, X_l⟩`, `dphi[i, c, k] = Σ_t s_k X'_i`.

First walk: the scalar products of grad_h with X and y, from which s follows (`coefficients`); of
the programs that share the tokens the last one to finish computes it. Second walk: all of the
above, 3 n C + 3 C elements a token. A program of the second walk owns a block of channels and a
range of tokens, so that its share of dphi stays in registers. Scalar products over all channels are
partial sums for each block. `sums` adds both up.

The walks are programs of one launch, in the order that `forward` describes: the second one reads
what the first one has left in the L2 cache. Where the weights of the read were another site's
(`shifted`) there is no first walk: s does not depend on grad_h, and `dpre_i = ⟨grad_h, X'_i⟩` is
one more product of the second.

Where the old streams are not in memory (`older`: see `blocks`) the products are those of G_i with
all sources, from which `dres_il` follows (`sums`). The gradient of the old streams is [T, n, C].

Where h has a norm grad_h above is dh, which needs two means over the channels (`norm`). The first
walk, then also that of `shifted`, sums up what gives them and the products of dh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    arrive,
    filled,
    load_mixing,
    load_numbers,
    load_sources,
    mixed,
    pinned,
    product,
    split,
    wait_for,
    wide,
)
from .coefficients import coefficients_backward, read_gradient
from .norm import (
    add_dots,
    denormed,
    dots_of,
    load_moments,
    normed_h,
    source_weights,
    store_gradients,
    times_gain,
)


@triton.jit
def _dots(
    grad_read, streams, branch_1, branch_2, branch, post, res, read_pre, gain, moments, partial, first, part, each,
    tokens, width,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, mixes: tl.constexpr, norm: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Walk over some tokens and `each` blocks of channels; write `partial` [parts, D, T].

    D is `dots_of` the sources.
    """
    local = tl.arange(0, block_tokens)
    rows = wide(first) + local
    live = rows < tokens
    here = wide(first) * width
    count: tl.constexpr = dots_of(m + mixes, norm)
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros([block_tokens, block_channels // 8 if norm != "" else block_channels], tl.float32),)
    if norm != "":
        of_h = source_weights(read_pre, post, res, rows, live, n, m, older, mixes)
        moments_of = load_moments(moments, rows, live)
    held: tl.constexpr = m - older
    begin = part * each
    for block in range(begin, tl.minimum(begin + each, tl.cdiv(width, block_channels))):
        channels = block * block_channels + tl.arange(0, block_channels)
        inside = live[:, None] & (channels < width)[None, :]
        at = local[:, None] * width + channels[None, :]
        g = tl.load((grad_read + here) + at, mask=inside, other=0.0).to(tl.float32)
        place = local[:, None] * (held * width) + channels[None, :]
        blocks = load_sources(streams, branch_1, branch_2, here, place, at, inside, width, held, older)
        if norm != "":
            if mixes:
                blocks = blocks + (tl.load((branch + here) + at, mask=inside, other=0.0),)
            x = normed_h(blocks, of_h, moments_of, m + mixes)
            sums = add_dots(sums, times_gain(g, gain, channels, width), x, blocks, m + mixes, norm)
        else:
            new = ()
            for l in tl.static_range(m):  # noqa: E741
                new = new + (sums[l] + g * blocks[l].to(tl.float32),)
            if mixes:
                new = new + (sums[m] + g * tl.load((branch + here) + at, mask=inside, other=0.0).to(tl.float32),)
            sums = new
    step = wide(tokens)
    own = partial + wide(part) * count * tokens + rows
    for l in tl.static_range(count):  # noqa: E741
        tl.store(own + l * step, tl.sum(sums[l], 1), mask=live)


@triton.jit
def _phi_rows(phi, channels, width, n: tl.constexpr, columns: tl.constexpr, thin: tl.constexpr, dtype: tl.constexpr):
    """Load n blocks [K, W] of `phi` [n C, K], K padded with 0, as `dtype`."""
    k = tl.arange(0, thin)[:, None]
    blocks = ()
    for i in tl.static_range(n):
        at = (i * width + channels)[None, :] * columns + k
        blocks = blocks + (tl.load(phi + at, mask=(channels < width)[None, :] & (k < columns), other=0.0).to(dtype),)
    return blocks


@triton.jit
def _inward(s, weight, total, halves: tl.constexpr, precision: tl.constexpr):
    """Compute `total + s @ weight`, [B, W]; `weight` is rounded as the gradient of streams is."""
    if halves == 2:
        coarse, fine = split(s)
        total = product(fine, weight, total, precision)
        return product(coarse, weight, total, precision)
    else:
        return product(s, weight, total, precision)


@triton.jit
def _outer(s, x, total, halves: tl.constexpr, precision: tl.constexpr):
    """Compute `total + sᵀ x`, [K, W] of [B, K] and [B, W]: a sum over tokens."""
    if halves == 2:
        coarse, fine = split(s)
        total = product(tl.trans(fine), x, total, precision)
        return product(tl.trans(coarse), x, total, precision)
    else:
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
    else:
        return tl.gather(x, tl.broadcast_to(tl.arange(0, x.shape[1])[None, :], x.shape), 1)


@triton.jit
def _streams(
    grad_streams, grad_read, streams, branch_1, branch_2, branch, post, res, last_res, phi, read_pre, scaled, radial,
    d_streams, d_branch, products_out, d_phi, block, group, begin, end, tokens, width,
    gain, shift, moments, levels, d_norm,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, columns: tl.constexpr, halves: tl.constexpr,
    thin: tl.constexpr, mixes: tl.constexpr, shifted: tl.constexpr, has_streams: tl.constexpr,
    has_read: tl.constexpr, precision: tl.constexpr, interpreted: tl.constexpr, norm: tl.constexpr,
    block_channels: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Walk over a block of channels from token `begin` to `end`."""
    local = tl.arange(0, block_tokens)
    channels = block * block_channels + tl.arange(0, block_channels)
    within = channels < width
    at = local[:, None] * width + channels[None, :]
    held: tl.constexpr = m - older
    back: tl.constexpr = n if older else m
    place = local[:, None] * (held * width) + channels[None, :]
    back_place = local[:, None] * (back * width) + channels[None, :]
    new_place = local[:, None] * (n * width) + channels[None, :]
    dtype: tl.constexpr = streams.dtype.element_ty if halves == 2 else tl.float32
    weights_of = _phi_rows(phi, channels, width, n, columns, thin, dtype)
    k = tl.arange(0, thin)
    step = wide(tokens)
    count: tl.constexpr = (n + n * m if mixes else 0) + (n if shifted else 0)
    sums = ()
    for _i in tl.static_range(n):
        sums = sums + (tl.zeros([thin, block_channels], tl.float32),)
    if norm != "":
        d_gain = tl.zeros([block_tokens, block_channels], tl.float32)
        d_shift = tl.zeros([block_tokens, block_channels], tl.float32)

    for start in range(begin, end, block_tokens):
        rows = wide(start) + local
        live = rows < tokens
        here = wide(start) * width
        inside = live[:, None] & within[None, :]
        thick = live[:, None] & (k < columns)[None, :]
        s = tl.load((scaled + wide(start) * columns) + local[:, None] * columns + k[None, :], mask=thick, other=0.0)
        inward = tl.load(radial + rows, mask=live, other=0.0)
        blocks = load_sources(streams, branch_1, branch_2, here, place, at, inside, width, held, older)
        if has_read:
            g_read = tl.load((grad_read + here) + at, mask=inside, other=0.0).to(tl.float32)
            pre = load_numbers(read_pre, rows, live, n)
        out = products_out + wide(block) * count * tokens + rows
        if mixes:
            y = tl.load((branch + here) + at, mask=inside, other=0.0).to(tl.float32)
            post_of = load_numbers(post, rows, live, n)
            mixing = load_mixing(res, rows, live, n, m, older)
            returned = mixing
            if older:
                returned = load_numbers(last_res, rows, live, n * n)
            d_y = tl.zeros([block_tokens, block_channels], tl.float32)
        if norm != "":
            of_h = source_weights(read_pre, post, res, rows, live, n, m, older, mixes)
            moments_of = load_moments(moments, rows, live)
            h = normed_h(blocks + (y,) if mixes else blocks, of_h, moments_of, m + mixes)
            d_gain += g_read * h
            d_shift += g_read
            level = tl.load(levels + rows, mask=live, other=0.0)
            along = tl.load((levels + step) + rows, mask=live, other=0.0)
            g_read = denormed(g_read, h, gain, channels, width, moments_of, level, along)
        d_x = ()
        for _l in tl.static_range(back):
            d_x = d_x + (tl.zeros([block_tokens, block_channels], tl.float32),)

        new_sums = ()
        for i in tl.static_range(n):
            if mixes:
                x = mixed(blocks, y, post_of, mixing, i, m).to(streams.dtype.element_ty)
            else:
                x = blocks[i % m]
            x = pinned(x, interpreted)
            new_sums = new_sums + (_outer(s, x, sums[i], halves, precision),)
            g = _inward(s, weights_of[i], tl.zeros([block_tokens, block_channels], tl.float32), halves, precision)
            g = _from_matrix_unit(g, interpreted)
            g -= inward[:, None] * x.to(tl.float32)
            if has_streams:
                g += tl.load((grad_streams + here * n + i * width) + new_place, mask=inside, other=0.0).to(tl.float32)
            if has_read:
                g += pre[i][:, None] * g_read
            if shifted:
                total = tl.sum(g_read * x.to(tl.float32), 1) if has_read else tl.zeros([block_tokens], tl.float32)
                tl.store(out + (count - n + i) * step, total, mask=live)
            if mixes:
                for l in tl.static_range(m):  # noqa: E741
                    tl.store(out + (n + i * m + l) * step, tl.sum(g * blocks[l].to(tl.float32), 1), mask=live)
            new_d_x = ()
            for l in tl.static_range(back):  # noqa: E741
                if mixes:
                    new_d_x = new_d_x + (d_x[l] + returned[i * back + l][:, None] * g,)
                elif i % m == l:
                    new_d_x = new_d_x + (d_x[l] + g,)
                else:
                    new_d_x = new_d_x + (d_x[l],)
            d_x = new_d_x
            if mixes:
                tl.store(out + i * step, tl.sum(g * y, 1), mask=live)
                d_y += post_of[i][:, None] * g
        sums = new_sums
        for l in tl.static_range(back):  # noqa: E741
            to = (d_streams + here * back + l * width) + back_place
            tl.store(to, d_x[l].to(d_streams.dtype.element_ty), mask=inside)
        if mixes:
            tl.store((d_branch + here) + at, d_y.to(d_branch.dtype.element_ty), mask=inside)

    if norm != "":
        store_gradients(d_norm + wide(group) * (2 * width), d_gain, d_shift, gain, shift, channels, width)
    own = d_phi + wide(group) * (n * width * columns)
    for i in tl.static_range(n):
        to = (i * width + channels)[None, :] * columns + k[:, None]
        tl.store(own + to, sums[i], mask=within[None, :] & (k < columns)[:, None])


@triton.jit(do_not_specialize=["tokens", "parts", "each", "group_tokens", "lag", "iterations"])
def backward_kernel(
    streams, grad_streams, grad_read, grad_pre, grad_post, grad_res, branch_1, branch_2, branch, post, res, last_res,
    read_pre, phi, bias, scale,
    new_pre, new_post, z, inverse,
    d_streams, d_branch, products, d_phi, shares, scaled, radial, partial, sums, counters,
    tokens, width, parts, each, group_tokens, lag, iterations, gain, shift, moments, levels, d_norm,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, columns: tl.constexpr, halves: tl.constexpr,
    thin: tl.constexpr, mixes: tl.constexpr, shifted: tl.constexpr, has_streams: tl.constexpr,
    has_read: tl.constexpr, has_pre: tl.constexpr, has_post: tl.constexpr, has_res: tl.constexpr,
    precision: tl.constexpr, interpreted: tl.constexpr, norm: tl.constexpr,
    mapping: tl.constexpr, sinkhorn_eps: tl.constexpr, turns: tl.constexpr,
    pre_eps: tl.constexpr, post_range: tl.constexpr, post_eps: tl.constexpr, gate_speed: tl.constexpr, scale_speed: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr, dot_tokens: tl.constexpr, dot_channels: tl.constexpr,
):  # fmt: skip
    """Compute `step_backward` where `mixes`, else `read_backward`, but for the sums.

    In: the gradients whose flags are set, the forward's inputs and results; `read_pre` [T, n] are
    the weights by which h was read, `last_res` [T, n, n] those of the site that ends; `res` is that
    too, or with `older` branches what all m sources weigh. Out: `d_streams` [T, n if older else m,
    C]; with `mixes` `d_branch` [T, C]; float32 `products` [blocks, n + n m, T], with `shifted` n
    more; `d_phi` [groups, n C, K]; `shares` [tiles, K + 3]; with a `norm` `d_norm` [groups, 2, C],
    parts of the gradients of gain and shift. Scratch, float32: `scaled` [T, K], `radial` [T],
    `partial` [parts, D, T] (`_dots`), `levels` [2, T], `sums` [iterations - 1, 2 n, T]; `counters`
    [1 + tiles + groups] int32, zero.
    `group_tokens` is a multiple of `dot_tokens`, the tokens of a tile.
    Grid: (groups + lag) (parts and tiles of a group + blocks).
    """
    place = tl.atomic_add(counters, 1)
    tiles = tl.cdiv(tokens, dot_tokens)
    groups = tl.cdiv(tokens, group_tokens)
    first = parts * (group_tokens // dot_tokens)
    blocks = tl.cdiv(width, block_channels)
    group = place // (first + blocks)
    item = place % (first + blocks)
    arrived = counters + 1
    ready = counters + 1 + tiles
    if item < first:
        tile = group * (group_tokens // dot_tokens) + item // parts
        if tile < tiles:
            rows = (tile * dot_tokens + tl.arange(0, dot_tokens)).to(tl.int64)
            live = rows < tokens
            walks: tl.constexpr = has_read and (norm != "" or not shifted)
            if walks:
                _dots(
                    grad_read, streams, branch_1, branch_2, branch, post, res, read_pre, gain, moments, partial,
                    tile * dot_tokens, item % parts, each, tokens, width,
                    n, m, older, mixes, norm, dot_tokens, dot_channels,
                )  # fmt: skip
            if arrive(arrived + tile) == parts - 1:
                if walks:
                    d_pre = read_gradient(
                        partial, parts, post, res, read_pre, moments, levels, rows, live, tokens, width,
                        n, m, older, mixes, norm,
                    )  # fmt: skip
                if shifted or not walks:
                    d_pre = filled(0.0, rows.to(tl.float32), n)
                if has_pre:
                    d_pre = load_numbers(grad_pre, rows, live, n)
                coefficients_backward(
                    d_pre, grad_post, grad_res, bias, scale, new_pre, new_post, z, inverse, scaled, radial,
                    shares + wide(tile) * (columns + 3), sums, rows, live, tokens, width, iterations,
                    n, columns, has_post, has_res,
                    mapping, sinkhorn_eps, turns, pre_eps, post_range, post_eps, gate_speed, scale_speed,
                )  # fmt: skip
                arrive(ready + group)
    else:
        group -= lag
        if (group >= 0) & (group < groups):
            begin = group * group_tokens
            end = tl.minimum(begin + group_tokens, tokens)
            wait_for(ready + group, tl.cdiv(end - begin, dot_tokens))
            _streams(
                grad_streams, grad_read, streams, branch_1, branch_2, branch, post, res, last_res, phi, read_pre,
                scaled, radial,
                d_streams, d_branch, products, d_phi, item - first, group, begin, end, tokens, width,
                gain, shift, moments, levels, d_norm,
                n, m, older, columns, halves, thin, mixes, shifted, has_streams, has_read, precision, interpreted, norm,
                block_channels, block_tokens,
            )  # fmt: skip
