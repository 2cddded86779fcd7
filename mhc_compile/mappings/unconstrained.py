"""H_res = the logits: hyper-connections without a manifold, for comparison.

Source: arXiv 2409.19606 (HC), in the parametrisation of arXiv 2512.24880 v2: H_res is the static
matrix plus the scaled projection, and nothing constrains it. Over depth its product grows or
vanishes, which is what the other mappings are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping

__all__ = ["Unconstrained"]


class Unconstrained(ResidualMapping):
    """Any matrix at all: n² logits, row-major. It starts as the identity."""

    name = "unconstrained"
    doubly_stochastic = False

    def logits(self, n: int) -> int:
        """n²."""
        return n * n

    def init_preserve(self, n: int) -> Tensor:
        """The identity. Nothing saturates here: every entry receives its whole gradient."""
        return torch.eye(n).flatten()

    def init_random(self, n: int) -> Tensor:
        """The identity too: with zeros there would be no residual path."""
        return self.init_preserve(n)

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """[..., n²] to [..., n, n]."""
        return logits.clone().unflatten(-1, (n, n))  # type: ignore[no-any-return]

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """[..., n, n] to [..., n²]."""
        return grad.flatten(-2).clone()

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """None."""
        return 0
