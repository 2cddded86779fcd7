"""Weighted means of all permutations: H_res is any matrix of the Birkhoff polytope, exactly.

Source: arXiv 2601.05732 (mHC-lite). By the theorem of Birkhoff and von Neumann every doubly
stochastic matrix is one:

    H = sum_k w_k P_k,   w = softmax(z),   k over the n! permutations,   P_k[i, sigma_k(i)] = 1

Rows and columns sum to sum_k w_k, which is 1 to rounding at any finite logits; there is nothing to
converge. With the gradient G of H the weights have u_k = sum_i G[i, sigma_k(i)] and the logits dz_k
= w_k (u_k - sum_l w_l u_l). n! logits are why n ends at 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping

LARGEST = 4


def permutations(n: int, device: torch.device | None = None) -> Tensor:
    """Return all permutations in lexicographic order, [n!, n] int64; entry [k, i] is sigma_k(i).

    They are computed from 0 to n! - 1, so that a traced graph needs no constant tensor. Digit i of
    k in the factorial number system is the number of smaller elements that follow, so from the last
    position on everything that is not smaller moves up.
    """
    k = torch.arange(math.factorial(n), device=device)
    at = [torch.div(k, math.factorial(n - 1 - i), rounding_mode="floor") % (n - i) for i in range(n)]
    for i in reversed(range(n - 1)):
        for j in range(i + 1, n):
            at[j] = at[j] + (at[j] >= at[i]).to(at[j].dtype)
    return torch.stack(at, -1)


def _entries(n: int, like: Tensor) -> list[Tensor]:
    """Return for every row i the [n!, n] matrix with a 1 at (k, sigma_k(i))."""
    chosen = permutations(n, like.device).unsqueeze(-1) == torch.arange(n, device=like.device)
    return list(chosen.to(like.dtype).unbind(1))


class Permutations(ResidualMapping):
    """mHC-lite: n! logits, n <= 4."""

    name = "permutations"

    #: H_ii at the start, near sinkhorn's. At n = 4 the identity's logit is then 5.8 and the other
    #: 23 share 0.064.
    diagonal = 0.95

    def check(self, n: int) -> None:
        """Reject n > 4: 5 streams would take 120 logits, 8 streams 40320."""
        if not 1 <= n <= LARGEST:
            raise self.reject(n, f"1 to {LARGEST} (it takes n! logits)")

    def logits(self, n: int) -> int:
        """Return n!."""
        self.check(n)
        return math.factorial(n)

    def init_preserve(self, n: int) -> Tensor:
        """Return a logit for the identity, such that H_ii = `diagonal`, and 0 for the others."""
        out = torch.zeros(self.logits(n))
        if n > 1:
            others = math.factorial(n) - 1
            # H_ii = w + (1 - w) f, where f is the part of the others that leave i where it is.
            f = (math.factorial(n - 1) - 1) / others
            weight = (self.diagonal - f) / (1 - f)
            out[0] = math.log(weight * others / (1 - weight))
        return out

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., n, n] from [..., n!].

        Products and sums instead of a matrix product: they fuse, and no tf32 cuts the weights.
        """
        weights = torch.softmax(logits, -1).unsqueeze(-1)
        return torch.stack([(weights * row).sum(-2) for row in _entries(n, logits)], -2)

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., n!] from [..., n, n]."""
        weights = torch.softmax(logits, -1)
        u = torch.zeros_like(weights)
        for i, row in enumerate(_entries(n, logits)):
            u = u + (grad[..., i, :].unsqueeze(-2) * row).sum(-1)
        return weights * (u - (weights * u).sum(-1, keepdim=True))

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """Return those of a softmax, and of n additions per weight."""
        return (4 + n) * math.factorial(n)
