"""Sinkhorn–Knopp and its exact adjoint on tokens, inside a kernel.

Arithmetic and guarantees: `mhc_compile.mappings.sinkhorn`. A block of tokens is a vector [B]
float32, and entry (i, j) of a matrix [n, n] is number i n + j of a tuple. So no step needs a
barrier or a shuffle. The code of a kernel does not grow with the number of iterations, which is
known at run time only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import filled, softmax, wide


@triton.jit
def _line_sums(matrix, n: tl.constexpr, step: tl.constexpr, along: tl.constexpr, eps: tl.constexpr):
    """Return n sums plus `eps`: line a has the entries `a step + b along`."""
    sums = ()
    for a in tl.static_range(n):
        total = matrix[a * step]
        for b in tl.static_range(1, n):
            total += matrix[a * step + b * along]
        if eps != 0.0:
            total += eps
        sums = sums + (total,)
    return sums


@triton.jit
def _dots(left, right, n: tl.constexpr, step: tl.constexpr, along: tl.constexpr):
    """Return the scalar products of n lines of two matrices."""
    sums = ()
    for a in tl.static_range(n):
        total = left[a * step] * right[a * step]
        for b in tl.static_range(1, n):
            total += left[a * step + b * along] * right[a * step + b * along]
        sums = sums + (total,)
    return sums


@triton.jit
def _inverses(values, count: tl.constexpr):
    inverses = ()
    for a in tl.static_range(count):
        inverses = inverses + (1.0 / values[a],)
    return inverses


@triton.jit
def _times(matrix, rows, columns, n: tl.constexpr):
    """Multiply entry (i, j) with `rows[i]` and `columns[j]`."""
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            values = values + (matrix[i * n + j] * rows[i] * columns[j],)
    return values


@triton.jit
def _first_round(logits, n: tl.constexpr, eps: tl.constexpr):
    """Return the first column softmax, the matrix after the row step, and the row's divisors.

    Without `eps` the round is done on logarithms, and the divisors are 1.
    """
    tops = ()
    inverses = ()
    logarithms = ()
    for j in tl.static_range(n):
        top = logits[j]
        for i in tl.static_range(1, n):
            top = tl.maximum(top, logits[i * n + j])
        total = tl.exp(logits[j] - top)
        for i in tl.static_range(1, n):
            total += tl.exp(logits[i * n + j] - top)
        tops = tops + (top,)
        inverses = inverses + (1.0 / total,)
        logarithms = logarithms + (top + tl.log(total),)
    columns = ()
    matrix = ()
    divisors = ()
    for i in tl.static_range(n):
        row = ()
        for j in tl.static_range(n):
            columns = columns + (tl.exp(logits[i * n + j] - tops[j]) * inverses[j],)
            if eps == 0.0:
                row = row + (logits[i * n + j] - logarithms[j],)
            else:
                row = row + (columns[i * n + j] + eps,)
        if eps == 0.0:
            matrix = matrix + softmax(row, n)
            divisors = divisors + (tl.zeros_like(row[0]) + 1.0,)
        else:
            total = row[0] + eps
            for j in tl.static_range(1, n):
                total += row[j]
            divisors = divisors + (total,)
            total = 1.0 / total
            for j in tl.static_range(n):
                matrix = matrix + (row[j] * total,)
    return columns, matrix, divisors


@triton.jit
def sinkhorn(logits, iterations, n: tl.constexpr, eps: tl.constexpr):
    """Normalise columns, then rows, `iterations` times, from a tuple of n² logits."""
    _, matrix, _ = _first_round(logits, n, eps)
    ones = filled(1.0, matrix[0], n)
    for _ in range(1, iterations):
        matrix = _times(matrix, ones, _inverses(_line_sums(matrix, n, 1, n, eps), n), n)
        matrix = _times(matrix, _inverses(_line_sums(matrix, n, n, 1, eps), n), ones, n)
    return matrix


@triton.jit
def sinkhorn_backward(grad, logits, sums, rows, live, tokens, iterations, n: tl.constexpr, eps: tl.constexpr):
    """Return the gradient of the logits for that of the matrix.

    `sums` [iterations - 1, 2 n, T] float32 is scratch memory for the divisors of every round.
    """
    columns, matrix, firsts = _first_round(logits, n, eps)
    ones = filled(1.0, matrix[0], n)
    here = sums + rows
    step = wide(tokens)
    for _ in range(1, iterations):
        by_column = _line_sums(matrix, n, 1, n, eps)
        matrix = _times(matrix, ones, _inverses(by_column, n), n)
        by_row = _line_sums(matrix, n, n, 1, eps)
        matrix = _times(matrix, _inverses(by_row, n), ones, n)
        for a in tl.static_range(n):
            tl.store(here + a * step, by_column[a], mask=live)
            tl.store(here + (n + a) * step, by_row[a], mask=live)
        here += 2 * n * step
    # Tokens are in the lanes of every warp, and one of them stores what all will read.
    tl.debug_barrier()
    for _ in range(1, iterations):
        here -= 2 * n * step
        by_row = ()
        by_column = ()
        for a in tl.static_range(n):
            by_column = by_column + (tl.load(here + a * step, mask=live, other=1.0),)
            by_row = by_row + (tl.load(here + (n + a) * step, mask=live, other=1.0),)
        grad = _step_backward(grad, _dots(grad, matrix, n, n, 1), _inverses(by_row, n), n, True)
        matrix = _times(matrix, by_row, ones, n)
        grad = _step_backward(grad, _dots(grad, matrix, n, 1, n), _inverses(by_column, n), n, False)
        matrix = _times(matrix, ones, by_column, n)

    # The first round: a row softmax of a column log-softmax, or with eps a row step.
    dots = _dots(grad, matrix, n, n, 1)
    new = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            if eps == 0.0:
                new = new + (matrix[i * n + j] * (grad[i * n + j] - dots[i]),)
            else:
                new = new + (columns[i * n + j] * (grad[i * n + j] - dots[i]) / firsts[i],)
    totals = _line_sums(new, n, 1, n, 0.0)
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            values = values + (new[i * n + j] - columns[i * n + j] * totals[j],)
    return values


@triton.jit
def _step_backward(grad, dots, inverses, n: tl.constexpr, by_row: tl.constexpr):
    """Return the adjoint of one normalisation, `(g − ⟨g, m⟩) / s` in each line."""
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            if by_row:
                values = values + ((grad[i * n + j] - dots[i]) * inverses[i],)
            else:
                values = values + ((grad[i * n + j] - dots[j]) * inverses[j],)
    return values
