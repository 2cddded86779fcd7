"""Kronecker products of 2 x 2 doubly stochastic matrices: H_res from 2 log2(n) logits.

Source: arXiv 2601.21579 (KromHC), with factors of size 2, so n = 2^K:

    H = U_1 (x) ... (x) U_K,   U_k = [[p_k, q_k], [q_k, p_k]],   (p_k, q_k) = softmax(z_k)

Products of doubly stochastic matrices are doubly stochastic, exactly. With the bits of i and j (the
first bit is the highest), H_ij depends on where they differ only: H_ij = h[i xor j], and h = (p_1,
q_1) (x) ... (x) (p_K, q_K) is all of it. It is a small part of the polytope: symmetric, and every
row the same numbers in another order. The gradient goes back the same way: d_h[m] = sum_i G[i, i
xor m], then through the product and each softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping

LARGEST = 8


def _fold(grad: Tensor, factors: int) -> Tensor:
    """Return d_h [..., 2^K] for the gradient [..., 2^K, 2^K] of H, from the highest bit on."""
    if factors == 0:
        return grad.squeeze(-1)
    half = grad.shape[-1] // 2
    (a, b), (c, d) = ([part[..., half * j : half * (j + 1)] for j in (0, 1)] for part in grad.split(half, -2))
    return torch.cat([_fold(a + d, factors - 1), _fold(b + c, factors - 1)], -1)


class Kronecker(ResidualMapping):
    """KromHC: 2 log2(n) logits, n a power of two."""

    name = "kronecker"

    #: H_ii at the start, near sinkhorn's: every factor has p = 0.95^(1/K).
    diagonal = 0.95

    def check(self, n: int) -> None:
        """Reject an n that is no power of two."""
        if not 1 <= n <= LARGEST or n & (n - 1):
            raise self.reject(n, "1, 2, 4 and 8 (it is a product of 2 x 2 matrices)")

    def logits(self, n: int) -> int:
        """Return 2 log2(n)."""
        return 2 * self.factors(n)

    def factors(self, n: int) -> int:
        """Return K, the number of 2 x 2 matrices."""
        self.check(n)
        return n.bit_length() - 1

    def init_preserve(self, n: int) -> Tensor:
        """Return a logit for p and 0 for q of each factor, such that H_ii = `diagonal`."""
        factors = self.factors(n)
        if factors == 0:
            return torch.empty(0)
        p = self.diagonal ** (1 / factors)
        return torch.tensor([math.log(p / (1 - p)), 0.0]).repeat(factors)

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., n, n] from [..., 2 log2(n)]."""
        pairs = torch.softmax(logits.unflatten(-1, (-1, 2)), -1) if n > 1 else logits
        out = logits.new_ones((*logits.shape[:-1], 1, 1))
        for k in range(self.factors(n)):
            p, q = (pairs[..., k, side, None, None] for side in (0, 1))
            # The factors that come later are the inner ones.
            out = torch.stack([torch.stack([out * p, out * q], -1), torch.stack([out * q, out * p], -1)], -3)
            out = out.flatten(-4, -3).flatten(-2)
        return out

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., 2 log2(n)] from [..., n, n]."""
        factors = self.factors(n)
        if factors == 0:
            return logits.new_zeros(logits.shape)
        pairs = torch.softmax(logits.unflatten(-1, (factors, 2)), -1)
        folded = _fold(grad, factors)
        grads = []
        for k in range(factors):
            # Sums over the factors before k from the front, over those after it from the back.
            u = folded
            for other in range(k):
                p, q = (pairs[..., other, side, None] for side in (0, 1))
                half = u.shape[-1] // 2
                u = u[..., :half] * p + u[..., half:] * q
            for other in reversed(range(k + 1, factors)):
                p, q = (pairs[..., other, side, None] for side in (0, 1))
                u = u[..., 0::2] * p + u[..., 1::2] * q
            y = pairs[..., k, :]
            grads.append(y * (u - (y * u).sum(-1, keepdim=True)))
        return torch.cat(grads, -1)

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """Return those of K softmaxes of two, and of products that grow to n²."""
        factors = self.factors(n)
        return 8 * factors + sum(1 << 2 * k for k in range(1, factors + 1))
