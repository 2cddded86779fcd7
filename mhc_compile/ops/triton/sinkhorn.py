"""Sinkhorn–Knopp and its exact adjoint on a block of tokens, inside a kernel.

Source: arXiv 2512.24880 v2, equations 8 and 9, in the arithmetic of
`mhc_compile.mappings.sinkhorn`: the first round on logarithms, the rest by multiplication; the
backward keeps only the sums and multiplies back. Blocks are [B, N, N] float32: B tokens, N the next
power of two of n. `res_logits` puts -inf where only the row or the column is padded, and 0 where
both are: the matrix and its gradient are block diagonal, so the iteration ignores the padding. The
code of a kernel does not grow with the number of iterations, which is known at run time only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def res_logits(z, bias, gain, n: tl.constexpr, size: tl.constexpr):
    """Return padded logits [B, N, N], `gain z + bias`; `bias` points to n² numbers."""
    i = tl.arange(0, size)[:, None]
    j = tl.arange(0, size)[None, :]
    offset = tl.load(bias + i * n + j, mask=(i < n) & (j < n), other=0.0).to(tl.float32)
    across = (i < n) != (j < n)
    return tl.where(across[None], float("-inf"), gain * z + offset[None])


@triton.jit
def _log_columns(logits):
    top = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - top[:, None, :]), 1)
    return logits - (top + tl.log(total))[:, None, :]


@triton.jit
def _softmax_rows(logits):
    top = tl.max(logits, 2)
    matrix = tl.exp(logits - top[:, :, None])
    return matrix * (1.0 / tl.sum(matrix, 2))[:, :, None]


@triton.jit
def sinkhorn(logits, iterations):
    """Normalise columns, then rows, `iterations` times, from logits [B, N, N]."""
    matrix = _softmax_rows(_log_columns(logits))
    for _ in range(1, iterations):
        matrix *= (1.0 / tl.sum(matrix, 1))[:, None, :]
        matrix *= (1.0 / tl.sum(matrix, 2))[:, :, None]
    return matrix


@triton.jit
def sinkhorn_backward(grad, logits, sums, rows, live, tokens, iterations, n: tl.constexpr, size: tl.constexpr):
    """Return the gradient [B, N, N] of the logits for `grad` [B, N, N].

    `sums` [iterations - 1, 2, T, n] float32 is scratch memory for the divisors of each step.
    """
    side = tl.arange(0, size)
    at = rows[:, None] * n + side[None, :]
    kept = live[:, None] & (side < n)[None, :]
    step = tl.full([], n, tl.int64) * tokens

    log_columns = _log_columns(logits)
    matrix = _softmax_rows(log_columns)
    here = sums + at
    for _ in range(1, iterations):
        column = tl.sum(matrix, 1)
        matrix *= (1.0 / column)[:, None, :]
        row = tl.sum(matrix, 2)
        matrix *= (1.0 / row)[:, :, None]
        tl.store(here, column, mask=kept)
        tl.store(here + step, row, mask=kept)
        here += 2 * step
    # What one thread stored another will read.
    tl.debug_barrier()

    for _ in range(1, iterations):
        here -= 2 * step
        row = tl.load(here + step, mask=kept, other=1.0)
        column = tl.load(here, mask=kept, other=1.0)
        grad = (grad - tl.sum(grad * matrix, 2)[:, :, None]) * (1.0 / row)[:, :, None]
        matrix *= row[:, :, None]
        grad = (grad - tl.sum(grad * matrix, 1)[:, None, :]) * (1.0 / column)[:, None, :]
        matrix *= column[:, None, :]
    # The first round is a row softmax of a column log-softmax.
    grad *= matrix
    grad -= matrix * tl.sum(grad, 2)[:, :, None]
    return grad - tl.exp(log_columns) * tl.sum(grad, 1)[:, None, :]
