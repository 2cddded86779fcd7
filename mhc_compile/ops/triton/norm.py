"""The norm of a branch's input h, where h is read and where its gradient is used.

Equations: `mhc_compile.ops.norm_reference`. With u = gain · grad and x = (h − mean) factor,

    dh = factor (u − level − x along),    level = mean(u) (0 for rms),    along = mean(u x)

where h is `Σ_s w_s source_s` over the old streams and the branch: neither h nor dh is in memory.
`norm` is "", "rms" or "layer"; an absent `gain` or `shift` [C] is None. `moments` [T, 2].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import load_mixing, load_numbers, load_sources, read_weights, wide


@triton.constexpr_function
def dots_of(sources, norm):
    """Return how many scalar products a token has in the first walk of the backward.

    Those of u with all sources; with a norm those of x too; for "layer" also the sums of all
    sources and of u, which come last.
    """
    return sources * (1 + (norm != "") + (norm == "layer")) + (norm == "layer")


@triton.jit
def times_gain(x, gain, channels, width):
    """Return `x` [B, W] times a gain, if there is one."""
    if gain is None:
        return x
    else:
        return x * tl.load(gain + channels, mask=channels < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _read_block(
    sources, weights, here, start, live, width,
    held: tl.constexpr, older: tl.constexpr, branch: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Return h [B, W] of some channels, and where it is: their numbers, the mask and the place."""
    local = tl.arange(0, live.shape[0])
    channels = start + tl.arange(0, block_channels)
    inside = live[:, None] & (channels < width)[None, :]
    place = local[:, None] * (held * width) + channels[None, :]
    at = local[:, None] * width + channels[None, :]
    blocks = load_sources(sources[0], sources[1], sources[2], here, place, at, inside, width, held, older)
    if branch:
        blocks = blocks + (tl.load((sources[3] + here) + at, mask=inside, other=0.0),)
    h = weights[0][:, None] * blocks[0].to(tl.float32)
    for s in tl.static_range(1, held + older + branch):
        h += weights[s][:, None] * blocks[s].to(tl.float32)
    return h, channels, inside, at


@triton.jit
def read_streams(
    sources, read_pre, post, res, read, gain, shift, moments, first, tokens, width, norm_eps,
    n: tl.constexpr, held: tl.constexpr, older: tl.constexpr, branch: tl.constexpr, norm: tl.constexpr,
    block_tokens: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Write h of some tokens from streams [T, held, C], and with a norm walk over them twice.

    `sources` are pointers to these, to those of `older` branches that count, and to the `branch`,
    where the streams that are read are not in memory.

    The variance is that around the mean of the first block of channels, which is not far from the
    mean: no more than a factor C / W is lost.
    """
    rows = wide(first) + tl.arange(0, block_tokens)
    live = rows < tokens
    here = wide(first) * width
    weights = source_weights(read_pre, post, res, rows, live, n, held + older, older, branch)
    if norm != "":
        mean = tl.zeros([block_tokens], tl.float32)
        if norm == "layer":
            h, _, _, _ = _read_block(sources, weights, here, 0, live, width, held, older, branch, block_channels)
            mean = tl.sum(h, 1) / tl.minimum(width, block_channels)
        total = tl.zeros([block_tokens, block_channels], tl.float32)
        squares = tl.zeros([block_tokens, block_channels], tl.float32)
        for start in range(0, width, block_channels):
            h, _, inside, _ = _read_block(
                sources, weights, here, start, live, width, held, older, branch, block_channels
            )
            if norm == "layer":
                h = tl.where(inside, h - mean[:, None], 0.0)
                total += h
            squares += h * h
        variance = tl.sum(squares, 1) / width
        if norm == "layer":
            off = tl.sum(total, 1) / width
            variance = tl.maximum(variance - off * off, 0.0)
            mean += off
        factor = tl.rsqrt(variance + norm_eps)
        tl.store(moments + 2 * rows, mean, mask=live)
        tl.store(moments + 2 * rows + 1, factor, mask=live)
    for start in range(0, width, block_channels):
        h, channels, inside, at = _read_block(
            sources, weights, here, start, live, width, held, older, branch, block_channels
        )
        if norm != "":
            h = times_gain((h - mean[:, None]) * factor[:, None], gain, channels, width)
            if shift is not None:
                h += tl.load(shift + channels, mask=channels < width, other=0.0).to(tl.float32)[None, :]
        tl.store((read + here) + at, h.to(read.dtype.element_ty), mask=inside)


@triton.jit
def source_weights(
    read_pre, post, res, rows, live, n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, mixes: tl.constexpr
):  # fmt: skip
    """Load what the sources weigh in h: m vectors [B], and with `mixes` the branch's."""
    pre = load_numbers(read_pre, rows, live, n)
    if mixes:
        return read_weights(pre, load_numbers(post, rows, live, n), load_mixing(res, rows, live, n, m, older), n, m)
    elif m == n:
        return pre
    else:
        total = pre[0]
        for i in tl.static_range(1, n):
            total += pre[i]
        return (total,)


@triton.jit
def load_moments(moments, rows, live):
    """Return mean and factor, two vectors [B]."""
    mean = tl.load(moments + 2 * rows, mask=live, other=0.0)
    return mean, tl.load(moments + 2 * rows + 1, mask=live, other=0.0)


@triton.jit
def normed_h(sources, weights, moments_of, count: tl.constexpr):
    """Compute x [B, W], float32, from blocks of `count` sources."""
    h = weights[0][:, None] * sources[0].to(tl.float32)
    for s in tl.static_range(1, count):
        h += weights[s][:, None] * sources[s].to(tl.float32)
    return (h - moments_of[0][:, None]) * moments_of[1][:, None]


@triton.jit
def add_dots(sums, u, x, sources, count: tl.constexpr, norm: tl.constexpr):
    """Add to the sums of `dots_of` those of a block; each is [B, W / 8].

    In bfloat16 8 neighbours belong to one thread, so that a sum takes one register of it.
    """
    terms = ()
    for s in tl.static_range(count):
        terms = terms + (u * sources[s].to(tl.float32),)
    for s in tl.static_range(count):
        terms = terms + (x * sources[s].to(tl.float32),)
    if norm == "layer":
        for s in tl.static_range(count):
            terms = terms + (sources[s].to(tl.float32),)
        terms = terms + (u,)
    new = ()
    for k in tl.static_range(dots_of(count, norm)):
        eights = tl.reshape(terms[k], [u.shape[0], u.shape[1] // 8, 8])
        new = new + (sums[k] + tl.sum(eights, 2),)
    return new


@triton.jit
def finish_dots(
    sums, weights, moments, levels, rows, live, tokens, width, count: tl.constexpr, norm: tl.constexpr
):  # fmt: skip
    """Store `levels` [2, T], level and along; return the products of dh with the sources."""
    mean, factor = load_moments(moments, rows, live)
    along = weights[0] * sums[0]
    for s in tl.static_range(1, count):
        along += weights[s] * sums[s]
    level = tl.zeros_like(factor)
    if norm == "layer":
        level = sums[3 * count] / width
        along -= mean * sums[3 * count]
    along *= factor / width
    tl.store(levels + rows, level, mask=live)
    tl.store((levels + wide(tokens)) + rows, along, mask=live)
    values = ()
    for s in tl.static_range(count):
        value = sums[s] - along * sums[count + s]
        if norm == "layer":
            value -= level * sums[2 * count + s]
        values = values + (factor * value,)
    return values


@triton.jit
def denormed(g, x, gain, channels, width, moments_of, level, along):
    """Return dh [B, W] of the gradient `g` of the normed h."""
    u = times_gain(g, gain, channels, width)
    return (u - level[:, None] - x * along[:, None]) * moments_of[1][:, None]


@triton.jit
def store_gradients(d_norm, d_gain, d_shift, gain, shift, channels, width):
    """Store sums over tokens [B, W], of what there is, in `d_norm` [2, C]."""
    if gain is not None:
        tl.store(d_norm + channels, tl.sum(d_gain, 0), mask=channels < width)
    if shift is not None:
        tl.store((d_norm + width) + channels, tl.sum(d_shift, 0), mask=channels < width)
