"""What the kernels share: tuples of blocks, the mixed streams, and products in pieces.

A program keeps its n streams as a tuple of n blocks [B, W] (B tokens, W channels), and a token's coefficients as a tuple of vectors [B]. Tuples
are unrolled by the compiler. Where `m` is 1 the n streams are equal and only one is held; `res` is then needed through its row sums alone.

Not yet run on a GPU; checked with Triton's interpreter.
"""
# ruff: noqa: RUF005 - the compiler takes `a + (b,)` only

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_mixing", "load_numbers", "load_streams", "mixed", "pinned", "product", "sigmoid", "split"]


@triton.jit
def sigmoid(x):
    """Logistic function of float32, without overflow."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_numbers(pointer, rows, live, count: tl.constexpr):
    """The `count` numbers of each token, a tuple of vectors [B] float32, from a tensor [T, count]."""
    values = ()
    for k in tl.static_range(count):
        values = values + (tl.load(pointer + rows * count + k, mask=live, other=0.0).to(tl.float32),)
    return values


@triton.jit
def load_mixing(res, rows, live, n: tl.constexpr, m: tl.constexpr):
    """`res` [T, n, n] as a tuple of n m vectors, entry (i, l) at i m + l; for m = 1 the n row sums."""
    entries = load_numbers(res, rows, live, n * n)
    if m == n:
        return entries
    else:  # noqa: RET505 - the compiler wants one return a branch
        totals = ()
        for i in tl.static_range(n):
            total = entries[i * n]
            for l in tl.static_range(1, n):  # noqa: E741
                total += entries[i * n + l]
            totals = totals + (total,)
        return totals


@triton.jit
def load_streams(streams, at, inside, width, m: tl.constexpr):
    """The m streams at one block of channels, a tuple of blocks [B, W] in their own dtype. `at` is the place in the first stream."""
    blocks = ()
    for l in tl.static_range(m):  # noqa: E741
        blocks = blocks + (tl.load(streams + at + l * width, mask=inside, other=0.0),)
    return blocks


@triton.jit
def mixed(blocks, branch, post, mixing, i: tl.constexpr, m: tl.constexpr):
    """New stream i, [B, W] float32: `Σ_l res_il X_l + post_i y`."""
    new = post[i][:, None] * branch
    for l in tl.static_range(m):  # noqa: E741
        new += mixing[i * m + l][:, None] * blocks[l].to(tl.float32)
    return new


@triton.jit
def split(x):
    """`x` float32 as two bfloat16 halves, the coarse and the fine one: 16 bits of mantissa together."""
    coarse = x.to(tl.bfloat16)
    return coarse, (x - coarse.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, total, precision: tl.constexpr):
    """`total + a @ b`, float32. `precision` is that of `Sizes`."""
    if precision == "bfloat16":
        return tl.dot(a, b, total)
    elif precision == "bfloat16 interpreted":  # noqa: RET505 - the compiler wants one return a branch
        # The interpreter multiplies the bit patterns of bfloat16 numbers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=precision)


@triton.jit
def pinned(x, interpreted: tl.constexpr):
    """`x`, computed once. Without this the compiler computes all of `x` a second time in the layout of a matrix unit's operand, in every warp."""
    if interpreted:
        return x
    elif x.dtype.primitive_bitwidth == 32:  # noqa: RET505 - the compiler wants one return a branch
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
