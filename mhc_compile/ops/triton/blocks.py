"""Shared parts of the kernels: tuples of blocks, the mixed streams, and products in pieces.

A program keeps its n streams as a tuple of n blocks [B, W] (B tokens, W channels), and a token's
coefficients as a tuple of vectors [B]; the compiler unrolls tuples. Where `m` is 1 the n streams
are equal and one is held; only the row sums of `res` are then needed.

The old streams may not be in memory: they are combinations of `held` streams and of the outputs of
`older` branches (`mhc_compile.ops.lazy_reference`). These are then the m = held + older sources of
the new streams, and `res` is not [T, n, n] but what they weigh in them, [T, n, m].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(x):
    """Return the number `x` with 64 bits; in the interpreter it may be one of Python's."""
    return tl.full([], 1, tl.int64) * x


@triton.jit
def filled(value, like, count: tl.constexpr):
    """Return a tuple of `count` vectors, all `value`, of the shape of `like`."""
    values = ()
    for _ in tl.static_range(count):
        values = values + (tl.zeros_like(like) + value,)
    return values


@triton.jit
def softmax(z, count: tl.constexpr):
    """Return the softmax over a tuple of `count` vectors."""
    top = z[0]
    for k in tl.static_range(1, count):
        top = tl.maximum(top, z[k])
    powers = ()
    for k in tl.static_range(count):
        powers = powers + (tl.exp(z[k] - top),)
    total = powers[0]
    for k in tl.static_range(1, count):
        total += powers[k]
    total = 1.0 / total
    weights = ()
    for k in tl.static_range(count):
        weights = weights + (powers[k] * total,)
    return weights


@triton.jit
def sigmoid(x):
    """Compute the logistic function of float32, without overflow."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_numbers(pointer, rows, live, count: tl.constexpr):
    """Load a tuple of `count` vectors [B] float32 from a tensor [T, count]."""
    values = ()
    for k in tl.static_range(count):
        values = values + (tl.load(pointer + rows * count + k, mask=live, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_numbers(pointer, values, rows, live, count: tl.constexpr):
    """Store a tuple of `count` vectors [B] in a tensor [T, count]."""
    for k in tl.static_range(count):
        tl.store(pointer + rows * count + k, values[k], mask=live)


@triton.jit
def load_mixing(res, rows, live, n: tl.constexpr, m: tl.constexpr, older: tl.constexpr):
    """Load `res` as n m vectors, entry (i, l) at i m + l; for m = 1 the n row sums."""
    entries = load_numbers(res, rows, live, n * (m if older else n))
    if older or m == n:
        return entries
    else:
        totals = ()
        for i in tl.static_range(n):
            total = entries[i * n]
            for l in tl.static_range(1, n):  # noqa: E741
                total += entries[i * n + l]
            totals = totals + (total,)
        return totals


@triton.jit
def load_streams(streams, at, inside, width, m: tl.constexpr):
    """Load m blocks [B, W], in their dtype; `at` is the place in the first stream.

    Places are 32-bit numbers that are added to a pointer which all threads share: 64-bit places
    would take twice the registers.
    """
    blocks = ()
    for l in tl.static_range(m):  # noqa: E741
        blocks = blocks + (tl.load((streams + l * width) + at, mask=inside, other=0.0),)
    return blocks


@triton.jit
def load_sources(
    streams, branch_1, branch_2, here, place, at, inside, width, held: tl.constexpr, older: tl.constexpr
):  # fmt: skip
    """Load blocks of the streams that are held and of older branches, from element `here`."""
    blocks = load_streams(streams + here * held, place, inside, width, held)
    if older > 0:
        blocks = blocks + (tl.load((branch_1 + here) + at, mask=inside, other=0.0),)
    if older > 1:
        blocks = blocks + (tl.load((branch_2 + here) + at, mask=inside, other=0.0),)
    return blocks


@triton.jit
def mixed(blocks, branch, post, mixing, i: tl.constexpr, m: tl.constexpr):
    """Compute new stream i, [B, W] float32: `Σ_l res_il X_l + post_i y`."""
    new = post[i][:, None] * branch
    for l in tl.static_range(m):  # noqa: E741
        new += mixing[i * m + l][:, None] * blocks[l].to(tl.float32)
    return new


@triton.jit
def read_weights(pre, post, mixing, n: tl.constexpr, m: tl.constexpr):
    """Return what m old streams and the branch weigh in `h = Σ_i pre_i X'_i`, m + 1 vectors [B]."""
    weights = ()
    for l in tl.static_range(m + 1):  # noqa: E741
        total = pre[0] * (mixing[l] if l < m else post[0])
        for i in tl.static_range(1, n):
            total += pre[i] * (mixing[i * m + l] if l < m else post[i])
        weights = weights + (total,)
    return weights


@triton.jit
def split(x):
    """Split float32 `x` into a coarse and a fine bfloat16 half, 16 bits of mantissa together."""
    coarse = x.to(tl.bfloat16)
    return coarse, (x - coarse.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, total, precision: tl.constexpr):
    """Compute `total + a @ b`, float32. `precision` is that of `Sizes`."""
    if precision == "bfloat16":
        return tl.dot(a, b, total)
    elif precision == "bfloat16 interpreted":
        # The interpreter multiplies the bit patterns of bfloat16 numbers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=precision)


@triton.jit
def pinned(x, interpreted: tl.constexpr):
    """Return `x`, computed once: the compiler would repeat it in the layout of an operand."""
    if interpreted:
        return x
    elif x.dtype.primitive_bitwidth == 32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def arrive(counter):
    """Count this program in at `counter` and return how many were before it.

    What all its threads have stored is then visible to those that see the count. The scheme is that
    of the grid barrier of Inductor's cooperative reductions.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait_for(counter, count):
    """Wait until `count` programs have arrived at `counter`, and see what they have stored."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _product(a, b, n: tl.constexpr, columns: tl.constexpr):
    """Return the product of matrices [n, n] and [n, columns] of each token, row-major tuples."""
    entries = ()
    for i in tl.static_range(n):
        for s in tl.static_range(columns):
            total = a[i * n] * b[s]
            for l in tl.static_range(1, n):  # noqa: E741
                total += a[i * n + l] * b[l * columns + s]
            entries = entries + (total,)
    return entries


@triton.jit
def _with_column(a, column, n: tl.constexpr, columns: tl.constexpr):
    """Return a matrix [n, columns] with one column more."""
    entries = ()
    for i in tl.static_range(n):
        for s in tl.static_range(columns):
            entries = entries + (a[i * columns + s],)
        entries = entries + (column[i],)
    return entries


@triton.jit
def _combine(
    post_1, res_1, post_2, res_2, res, combined, rows, tokens, n: tl.constexpr, m: tl.constexpr, older: tl.constexpr
):
    """Store what the sources weigh in the old streams, and `res` times that: [2, T, n, m]."""
    live = rows < tokens
    held: tl.constexpr = m - older
    weights = _with_column(load_mixing(res_1, rows, live, n, held, 0), load_numbers(post_1, rows, live, n), n, held)
    if older > 1:
        weights = _product(load_numbers(res_2, rows, live, n * n), weights, n, held + 1)
        weights = _with_column(weights, load_numbers(post_2, rows, live, n), n, held + 1)
    store_numbers(combined, weights, rows, live, n * m)
    weights = _product(load_numbers(res, rows, live, n * n), weights, n, m)
    store_numbers(combined + wide(tokens) * (n * m), weights, rows, live, n * m)


@triton.jit(do_not_specialize=["size", "zeros", "tokens"])
def prepare_kernel(
    counters, phi, packed, zeros, size, post_1, res_1, post_2, res_2, res, combined, tokens,
    columns: tl.constexpr, stride: tl.constexpr, packs: tl.constexpr,
    n: tl.constexpr, m: tl.constexpr, older: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Do what the programs of the next kernel would each do again.

    Set `zeros` counters (int32) to 0. Where `packs` split phi [R, K] into bfloat16 halves: `packed`
    is [2, R, stride], the coarse ones, then the fine ones. With `older` branches combine the
    coefficients of their sites with those of the last: `combined` [2, T, n, m] float32. Grid:
    `size` and `zeros` over `block`, and tokens over 128, whichever is more.
    """
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(counters + at, tl.zeros([block], tl.int32), mask=at < zeros)
    if packs:
        inside = at < size
        rows = at // columns
        to = rows.to(tl.int64) * stride + at % columns
        coarse, fine = split(tl.load(phi + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(packed + to, coarse, mask=inside)
        tl.store(packed + to + wide(size // columns) * stride, fine, mask=inside)
    if older:
        rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
        _combine(post_1, res_1, post_2, res_2, res, combined, rows, tokens, n, m, older)
