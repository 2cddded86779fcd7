"""The forward kernel of a site: new streams, coefficients, and the input of the next branch.

Source: arXiv 2512.24880 v2, equations 3 to 9. The streams are walked over in pieces of some tokens
and some channels: load, mix, store, and add up squares and the thin projection. Of the programs
that share the tokens, the last one to finish computes their coefficients. Where the weights of the
read are known before (`shifted`: they are the site's before), h is written in the same walk, and
2 n C + 2 C elements a token are moved. The new streams need not be written (`writes`), nor the old
ones be in memory (`older`: see `blocks`).

Else, and where h has a norm, it needs a second walk, over the new streams or their sources. It is
the work of later programs of the same launch, `lag` tiles of tokens after the first, so that the
streams are still in the L2 cache. They wait for the coefficients, and with a norm read the streams
twice. Each program takes a number when it begins, and its work by that number; a walk only waits
for programs with a smaller number, which have begun and wait for none, so that no order in which a
GPU begins programs can end in a deadlock.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    arrive,
    load_mixing,
    load_numbers,
    load_sources,
    mixed,
    pinned,
    product,
    read_weights,
    wait_for,
    wide,
)
from .coefficients import coefficients
from .norm import read_streams


@triton.jit
def _project(
    streams, branch_1, branch_2, branch, post, res, read_pre, phi, new_streams, read, partial, first, part, each,
    tokens, width,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr,
    thin: tl.constexpr, mixes: tl.constexpr, writes: tl.constexpr, shifted: tl.constexpr, halves: tl.constexpr,
    precision: tl.constexpr, interpreted: tl.constexpr, block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Walk over some tokens and `each` blocks of channels; write `partial` [parts, K + 1, T]."""
    local = tl.arange(0, block_tokens)
    rows = wide(first) + local
    live = rows < tokens
    here = wide(first) * width
    if mixes:
        weights = load_numbers(post, rows, live, n)
        mixing = load_mixing(res, rows, live, n, m, older)
    if shifted:
        reading = read_weights(load_numbers(read_pre, rows, live, n), weights, mixing, n, m)

    k = tl.arange(0, thin)
    projection = tl.zeros([block_tokens, thin], tl.float32)
    squares = tl.zeros([block_tokens, block_channels // 8], tl.float32)
    held: tl.constexpr = m - older
    begin = part * each
    for block in range(begin, tl.minimum(begin + each, tl.cdiv(width, block_channels))):
        channels = block * block_channels + tl.arange(0, block_channels)
        within = channels < width
        inside = live[:, None] & within[None, :]
        at = local[:, None] * width + channels[None, :]
        place = local[:, None] * (held * width) + channels[None, :]
        blocks = load_sources(streams, branch_1, branch_2, here, place, at, inside, width, held, older)
        if mixes:
            y = tl.load(branch + here + at, mask=inside, other=0.0).to(tl.float32)
            to = local[:, None] * (n * width) + channels[None, :]
        if shifted:
            h = reading[m][:, None] * y
            for l in tl.static_range(m):  # noqa: E741
                h += reading[l][:, None] * blocks[l].to(tl.float32)
            tl.store((read + here) + at, h.to(read.dtype.element_ty), mask=inside)
        for i in tl.static_range(n):
            if mixes:
                x = mixed(blocks, y, weights, mixing, i, m).to(streams.dtype.element_ty)
                x = pinned(x, interpreted)
                if writes:
                    tl.store((new_streams + here * n + i * width) + to, x, mask=inside)
            else:
                x = blocks[i % m]
            square = x.to(tl.float32) * x.to(tl.float32)
            squares += tl.sum(tl.reshape(square, [block_tokens, block_channels // 8, 8]), 2)
            weight = channels[:, None] * stride + k[None, :]
            there = within[:, None] & (k < columns)[None, :]
            coarse = tl.load((phi + i * width * stride) + weight, mask=there, other=0.0)
            projection = product(x, coarse, projection, precision)
            if halves == 2:
                fine = tl.load((phi + (n + i) * width * stride) + weight, mask=there, other=0.0)
                projection = product(x, fine, projection, precision)

    own = partial + wide(part) * (columns + 1) * tokens
    step = wide(tokens)
    to = rows[:, None] + k[None, :] * step
    tl.store(own + to, projection, mask=live[:, None] & (k < columns)[None, :])
    tl.store(own + columns * step + rows, tl.sum(squares, 1), mask=live)


@triton.jit(do_not_specialize=["tokens", "parts", "each", "lag", "iterations"])
def forward_kernel(
    streams, branch_1, branch_2, branch, post, res, read_pre, phi, bias, scale,
    new_streams, read, new_pre, new_post, new_res, z, inverse, partial, counters,
    tokens, width, parts, each, lag, iterations, eps, gain, shift, moments, norm_eps,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr,
    thin: tl.constexpr, mixes: tl.constexpr, writes: tl.constexpr, shifted: tl.constexpr, halves: tl.constexpr,
    precision: tl.constexpr, interpreted: tl.constexpr, norm: tl.constexpr,
    mapping: tl.constexpr, sinkhorn_eps: tl.constexpr, turns: tl.constexpr,
    pre_eps: tl.constexpr, post_range: tl.constexpr, post_eps: tl.constexpr, gate_speed: tl.constexpr, scale_speed: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr, read_tokens: tl.constexpr, read_channels: tl.constexpr,
):  # fmt: skip
    """Compute `step` where `mixes`, else `read`; with `shifted` h is written in the first walk.

    In: `streams` [T, m - older, C], `branch_1` and `branch_2` [T, C] if there are so many older
    ones; with `mixes` also `branch` [T, C], `post` [T, n], `res` [T, n, n], or of m sources;
    `read_pre` [T, n], the weights of h, which may be `new_pre` unless `shifted`; `phi`
    [halves, n C, stride], of which K columns are used (see `prepare_kernel`); `bias` [K], `scale`
    [3]; `gain`, `shift` [C] or None. Out: if it `writes` `new_streams` [T, n, C]; `read` [T, C];
    float32 `new_pre`, `new_post` [T, n], `new_res` [T, n, n], `z` [T, K], `inverse` [T], with a
    `norm` `moments` [T, 2].
    Scratch: `partial` [parts, K + 1, T] float32, `counters` [1 + 2 tiles] int32, zero.
    Grid: (tiles + lag) (parts + reads of a tile), lag and reads 0 where `shifted`.
    """
    reads: tl.constexpr = 0 if shifted else block_tokens // read_tokens
    place = tl.program_id(0)
    if not shifted:
        place = tl.atomic_add(counters, 1)
    tile = place // (parts + reads)
    item = place % (parts + reads)
    tiles = tl.cdiv(tokens, block_tokens)
    arrived = counters + 1
    ready = counters + 1 + tiles
    if item < parts:
        if tile < tiles:
            _project(
                streams, branch_1, branch_2, branch, post, res, read_pre, phi, new_streams, read, partial,
                tile * block_tokens, item, each, tokens, width, n, m, older, columns, stride, thin, mixes, writes,
                shifted, halves, precision, interpreted, block_tokens, block_channels,
            )  # fmt: skip
            if arrive(arrived + tile) == parts - 1:
                rows = (tile * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
                coefficients(
                    partial, parts, bias, scale, new_pre, new_post, new_res, z, inverse, rows, rows < tokens, tokens,
                    width, iterations, eps, n, columns, mapping, sinkhorn_eps, turns, pre_eps, post_range, post_eps, gate_speed, scale_speed,
                )  # fmt: skip
                if not shifted:
                    arrive(ready + tile)
    elif not shifted:
        tile -= lag
        if (tile >= 0) & (tile < tiles):
            wait_for(ready + tile, 1)
            sources = (new_streams if writes else streams), branch_1, branch_2, branch
            held: tl.constexpr = n if writes else m - older
            first = tile * block_tokens + (item - parts) * read_tokens
            read_streams(
                sources, read_pre, post, res, read, gain, shift, moments, first, tokens, width, norm_eps,
                n, held, 0 if writes else older, mixes and not writes, norm, read_tokens, read_channels,
            )  # fmt: skip
