"""The residual mappings and their exact adjoints on tokens, inside a kernel.

Source and guarantees: the module of the same name in `mhc_compile.mappings`. A block of tokens is a
vector [B] float32, logits and matrices are tuples of them: entry (i, j) of a matrix [n, n] is
number i n + j. So no step of Sinkhorn needs a barrier or a shuffle. The code of a kernel does not
grow with the number of iterations, which is known at run time only.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .blocks import wide


@triton.jit
def filled(value, like, count: tl.constexpr):
    """Return a tuple of `count` vectors, all `value`, of the shape of `like`."""
    values = ()
    for _ in tl.static_range(count):
        values = values + (tl.zeros_like(like) + value,)
    return values


@triton.jit
def turned(matrix, n: tl.constexpr, turns: tl.constexpr):
    """Return the transposed matrix where `turns`, else the matrix."""
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            if turns:
                values = values + (matrix[j * n + i],)
            else:
                values = values + (matrix[i * n + j],)
    return values


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
def _softmax_backward(weights, grad, count: tl.constexpr):
    dot = weights[0] * grad[0]
    for k in tl.static_range(1, count):
        dot += weights[k] * grad[k]
    values = ()
    for k in tl.static_range(count):
        values = values + (weights[k] * (grad[k] - dot),)
    return values


# --- Sinkhorn


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
def _sinkhorn(logits, iterations, n: tl.constexpr, eps: tl.constexpr):
    _, matrix, _ = _first_round(logits, n, eps)
    ones = filled(1.0, matrix[0], n)
    for _ in range(1, iterations):
        matrix = _times(matrix, ones, _inverses(_line_sums(matrix, n, 1, n, eps), n), n)
        matrix = _times(matrix, _inverses(_line_sums(matrix, n, n, 1, eps), n), ones, n)
    return matrix


@triton.jit
def _sinkhorn_backward(grad, logits, sums, rows, live, tokens, iterations, n: tl.constexpr, eps: tl.constexpr):
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


# --- permutations and Kronecker products: tables known while a kernel is compiled


@triton.constexpr_function
def factorial(n):
    """Return n!."""
    return math.factorial(n)


@triton.constexpr_function
def permuted(n, k, i):
    """Return σ_k(i) of permutation k of n in lexicographic order."""
    left = list(range(n))
    for place in range(i + 1):
        digit, k = divmod(k, math.factorial(n - 1 - place))
        chosen = left.pop(digit)
    return chosen


@triton.constexpr_function
def sends(n, k, i, j):
    """Return whether permutation k sends i to j."""
    return permuted(n, k, i) == j


@triton.constexpr_function
def factors(n):
    """Return the number of 2 x 2 factors of a matrix of n = 2^K."""
    return n.bit_length() - 1


@triton.constexpr_function
def half(n, j, k):
    """Return 2 k + the bit of j that chooses p or q of factor k; the first has the highest bit."""
    return 2 * k + (j >> (n.bit_length() - 2 - k) & 1)


@triton.jit
def _permutations(logits, n: tl.constexpr):
    weights = softmax(logits, factorial(n))
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            total = tl.zeros_like(logits[0])
            for k in tl.static_range(factorial(n)):
                if sends(n, k, i, j):
                    total += weights[k]
            values = values + (total,)
    return values


@triton.jit
def _permutations_backward(grad, logits, n: tl.constexpr):
    weights = softmax(logits, factorial(n))
    d_weights = ()
    for k in tl.static_range(factorial(n)):
        total = grad[permuted(n, k, 0)]
        for i in tl.static_range(1, n):
            total += grad[i * n + permuted(n, k, i)]
        d_weights = d_weights + (total,)
    return _softmax_backward(weights, d_weights, factorial(n))


@triton.jit
def _halves(logits, n: tl.constexpr):
    """Return (p, q) of each factor."""
    values = ()
    for k in tl.static_range(factors(n)):
        values = values + softmax((logits[2 * k], logits[2 * k + 1]), 2)
    return values


@triton.jit
def _entry(pairs, like, j: tl.constexpr, left_out: tl.constexpr, n: tl.constexpr):
    """Return h[j], the product over all factors but one."""
    product = tl.zeros_like(like) + 1.0
    for k in tl.static_range(factors(n)):
        if k != left_out:
            product *= pairs[half(n, j, k)]
    return product


@triton.jit
def _kronecker(logits, like, n: tl.constexpr):
    pairs = _halves(logits, n)
    first_row = ()
    for j in tl.static_range(n):
        first_row = first_row + (_entry(pairs, like, j, -1, n),)
    values = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            values = values + (first_row[i ^ j],)
    return values


@triton.jit
def _kronecker_backward(grad, logits, n: tl.constexpr):
    pairs = _halves(logits, n)
    values = ()
    for k in tl.static_range(factors(n)):
        d_p = tl.zeros_like(grad[0])
        d_q = tl.zeros_like(grad[0])
        for j in tl.static_range(n):
            total = grad[j]
            for i in tl.static_range(1, n):
                total += grad[i * n + (i ^ j)]
            total *= _entry(pairs, grad[0], j, k, n)
            if half(n, j, k) == 2 * k:
                d_p += total
            else:
                d_q += total
        values = values + _softmax_backward((pairs[2 * k], pairs[2 * k + 1]), (d_p, d_q), 2)
    return values


# --- by name


@triton.jit
def matrix_of(logits, like, iterations, n: tl.constexpr, mapping: tl.constexpr, eps: tl.constexpr, turns: tl.constexpr):
    """Return H_res of its logits; `like` is any vector [B] float32.

    `eps` and `turns` are the `sinkhorn_eps` and `last == "columns"` of the convention.
    """
    if mapping == "sinkhorn":
        return turned(_sinkhorn(turned(logits, n, turns), iterations, n, eps), n, turns)
    elif mapping == "identity":
        values = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                values = values + (tl.zeros_like(like) + (i == j),)
        return values
    elif mapping == "permutations":
        return _permutations(logits, n)
    elif mapping == "kronecker":
        return _kronecker(logits, like, n)
    else:
        tl.static_assert(mapping == "unconstrained")
        return logits


@triton.jit
def matrix_backward(
    grad, logits, sums, rows, live, tokens, iterations,
    n: tl.constexpr, mapping: tl.constexpr, eps: tl.constexpr, turns: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the logits for that of H_res, a tuple of n² vectors."""
    if mapping == "sinkhorn":
        grad = _sinkhorn_backward(
            turned(grad, n, turns), turned(logits, n, turns), sums, rows, live, tokens, iterations, n, eps
        )
        return turned(grad, n, turns)
    elif mapping == "identity":
        return ()
    elif mapping == "permutations":
        return _permutations_backward(grad, logits, n)
    elif mapping == "kronecker":
        return _kronecker_backward(grad, logits, n)
    else:
        return grad
