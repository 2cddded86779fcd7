"""The residual mappings and their exact adjoints on tokens, inside a kernel.

Source and guarantees: the module of the same name in `mhc_compile.mappings`. A block of tokens is a
vector [B] float32, logits and matrices are tuples of them: entry (i, j) of a matrix [n, n] is
number i n + j.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .blocks import softmax
from .sinkhorn import sinkhorn, sinkhorn_backward


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
def _softmax_backward(weights, grad, count: tl.constexpr):
    dot = weights[0] * grad[0]
    for k in tl.static_range(1, count):
        dot += weights[k] * grad[k]
    values = ()
    for k in tl.static_range(count):
        values = values + (weights[k] * (grad[k] - dot),)
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
        return turned(sinkhorn(turned(logits, n, turns), iterations, n, eps), n, turns)
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
        grad = sinkhorn_backward(
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
