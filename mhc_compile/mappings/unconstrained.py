"""H_res = the logits: hyper-connections without a manifold, for comparison.

Source: arXiv 2409.19606 (HC), in the parametrisation of arXiv 2512.24880 v2: H_res is the static
matrix plus the scaled projection, and nothing constrains it. Over depth its product grows or
vanishes, which is what the other mappings are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping


class Unconstrained(ResidualMapping):
    """Any matrix at all: n² logits, row-major. It starts as the identity."""

    name = "unconstrained"
    doubly_stochastic = False

    def logits(self, n: int) -> int:
        """Return n²."""
        return n * n

    def init_preserve(self, n: int) -> Tensor:
        """Return the identity. Nothing saturates: every entry receives its whole gradient."""
        return torch.eye(n).flatten()

    def init_random(self, n: int) -> Tensor:
        """Return the identity: with zeros there would be no residual path."""
        return self.init_preserve(n)

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., n, n] from [..., n²]."""
        return logits.clone().unflatten(-1, (n, n))  # type: ignore[no-any-return]

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Compute [..., n²] from [..., n, n]."""
        return grad.flatten(-2).clone()

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """Return 0."""
        return 0
