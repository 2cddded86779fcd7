"""The coefficients of a site from its projection, and the gradient of the projection.

Source: arXiv 2512.24880 v2, equations 5 to 9, with the settings of a convention
(`mhc_compile.config.coefficient_spec`); the gradients are those of
`mhc_compile.ops.reference.coefficients_backward`. A block of tokens is a vector [B] float32, and
everything of a token a tuple of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import filled, load_mixing, load_numbers, sigmoid, store_numbers, wide
from .mappings import matrix_backward, matrix_of
from .norm import dots_of, finish_dots, source_weights


@triton.jit
def add_parts(partial, parts, rows, live, tokens, count: tl.constexpr):
    """Sum `partial` [parts, count, T] over its parts, in order: a tuple of `count` vectors."""
    step = wide(tokens)
    sums = filled(0.0, rows.to(tl.float32), count)
    here = partial + rows
    for _ in range(parts):
        new = ()
        for k in tl.static_range(count):
            new = new + (sums[k] + tl.load(here + k * step, mask=live, other=0.0),)
        sums = new
        here += count * step
    return sums


@triton.constexpr_function
def _part(k, n):
    """Return 0, 1 or 2 for a logit of pre, post or res."""
    return min(k // n, 2)


@triton.jit
def _gain(scale, k: tl.constexpr, n: tl.constexpr, scale_speed: tl.constexpr):
    """Return the factor of projection k in its logit."""
    return scale_speed * tl.load(scale + _part(k, n)).to(tl.float32)


@triton.jit
def _logit(bias, scale, z, k: tl.constexpr, n: tl.constexpr, gate_speed: tl.constexpr, scale_speed: tl.constexpr):
    """Return logit k of tokens whose projections to it are `z`."""
    return _gain(scale, k, n, scale_speed) * z + gate_speed * tl.load(bias + k).to(tl.float32)


@triton.jit
def coefficients(
    partial, parts, bias, scale, pre, post, res, z, inverse, rows, live, tokens, width, iterations, eps,
    n: tl.constexpr, columns: tl.constexpr,
    mapping: tl.constexpr, sinkhorn_eps: tl.constexpr, turns: tl.constexpr,
    pre_eps: tl.constexpr, post_range: tl.constexpr, post_eps: tl.constexpr, gate_speed: tl.constexpr, scale_speed: tl.constexpr,
):  # fmt: skip
    """Store `pre`, `post` [T, n], `res` [T, n, n], `z` [T, K] and `inverse` [T].

    `partial` [parts, K + 1, T]: the projection of the streams and their sum of squares.
    """
    sums = add_parts(partial, parts, rows, live, tokens, columns + 1)
    over_rms = tl.rsqrt(sums[columns] / (n * width) + eps)
    tl.store(inverse + rows, over_rms, mask=live)
    logits = ()
    for k in tl.static_range(columns):
        projected = sums[k] * over_rms
        tl.store(z + rows * columns + k, projected, mask=live)
        logits = logits + (_logit(bias, scale, projected, k, n, gate_speed, scale_speed),)
    residual = ()
    for k in tl.static_range(columns):
        if k < n:
            tl.store(pre + rows * n + k, sigmoid(logits[k]) + pre_eps, mask=live)
        elif k < 2 * n:
            tl.store(post + rows * n + (k - n), post_range * sigmoid(logits[k]) + post_eps, mask=live)
        else:
            residual = residual + (logits[k],)
    matrix = matrix_of(residual, over_rms, iterations, n, mapping, sinkhorn_eps, turns)
    store_numbers(res, matrix, rows, live, n * n)


@triton.jit
def read_gradient(
    partial, parts, post, res, read_pre, moments, levels, rows, live, tokens, width,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, mixes: tl.constexpr, norm: tl.constexpr,
):  # fmt: skip
    """Return `⟨dh, X'_j⟩` for each j, where dh is the gradient of h without its norm.

    `partial` [parts, D, T]: the products of `norm.dots_of`, without a norm those of dh with the old
    streams (and the branch). With `X'_j = Σ_l res_jl X_l + post_j y` the new streams need not be
    read. `levels` [2, T] are written where there is a norm.
    """
    sums = add_parts(partial, parts, rows, live, tokens, dots_of(m + mixes, norm))
    if norm != "":
        of_h = source_weights(read_pre, post, res, rows, live, n, m, older, mixes)
        sums = finish_dots(sums, of_h, moments, levels, rows, live, tokens, width, m + mixes, norm)
    if mixes:
        weights = load_numbers(post, rows, live, n)
        mixing = load_mixing(res, rows, live, n, m, older)
        values = ()
        for j in tl.static_range(n):
            total = weights[j] * sums[m]
            for l in tl.static_range(m):  # noqa: E741
                total += mixing[j * m + l] * sums[l]
            values = values + (total,)
        return values
    elif m == n:
        return sums
    else:
        return filled(sums[0], sums[0], n)


@triton.jit
def coefficients_backward(
    d_pre, grad_post, grad_res, bias, scale, pre, post, z, inverse, scaled, radial, shares, sums,
    rows, live, tokens, width, iterations,
    n: tl.constexpr, columns: tl.constexpr, has_post: tl.constexpr, has_res: tl.constexpr,
    mapping: tl.constexpr, sinkhorn_eps: tl.constexpr, turns: tl.constexpr,
    pre_eps: tl.constexpr, post_range: tl.constexpr, post_eps: tl.constexpr, gate_speed: tl.constexpr, scale_speed: tl.constexpr,
):  # fmt: skip
    """Store `scaled` [T, K] = dz / rms, `radial` [T] and `shares` [K + 3].

    `d_pre` is a tuple of n vectors; `grad_post` [T, n] and `grad_res` [T, n, n] are read if their
    flags are set. `radial` is the factor of X' in its own gradient; `shares` are these tokens'
    parts of d_bias and d_scale.
    """
    over_rms = tl.load(inverse + rows, mask=live, other=0.0)
    before = load_numbers(pre, rows, live, n)
    d_logits = ()
    for k in tl.static_range(n):
        value = before[k] - pre_eps
        d_logits = d_logits + (tl.where(live, d_pre[k] * value * (1.0 - value), 0.0),)
    for k in tl.static_range(n):
        if has_post:
            value = tl.load(post + rows * n + k, mask=live, other=post_eps) - post_eps
            grad = tl.load(grad_post + rows * n + k, mask=live, other=0.0).to(tl.float32)
            d_logits = d_logits + (grad * value * (1.0 - value * (1.0 / post_range)),)
        else:
            d_logits = d_logits + (tl.zeros_like(over_rms),)
    if columns > 2 * n:
        if has_res:
            logits = ()
            for k in tl.static_range(2 * n, columns):
                value = tl.load(z + rows * columns + k, mask=live, other=0.0)
                logits = logits + (_logit(bias, scale, value, k, n, gate_speed, scale_speed),)
            grad = load_numbers(grad_res, rows, live, n * n)
            d_logits = d_logits + matrix_backward(
                grad, logits, sums, rows, live, tokens, iterations, n, mapping, sinkhorn_eps, turns
            )
        else:
            d_logits = d_logits + filled(0.0, over_rms, columns - 2 * n)

    along = tl.zeros_like(over_rms)
    turns_of = filled(0.0, over_rms, 3)
    for k in tl.static_range(columns):
        value = d_logits[k]
        tl.store(shares + k, tl.sum(value, 0))  # not times gate_speed: see reference.coefficients_backward
        turn = value * tl.load(z + rows * columns + k, mask=live, other=0.0)
        new = ()
        for p in tl.static_range(3):
            if p == _part(k, n):
                new = new + (turns_of[p] + turn,)
            else:
                new = new + (turns_of[p],)
        turns_of = new
        gain = _gain(scale, k, n, scale_speed)
        along += gain * turn
        tl.store(scaled + rows * columns + k, gain * value * over_rms, mask=live)
    for p in tl.static_range(3):
        tl.store(shares + columns + p, scale_speed * tl.sum(turns_of[p], 0))
    tl.store(radial + rows, over_rms * over_rms * along / (n * width), mask=live)
