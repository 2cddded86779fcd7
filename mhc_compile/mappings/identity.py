"""H_res = I: streams are never mixed, they only read (`pre`) and write (`post`) with weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping

__all__ = ["Identity"]


class Identity(ResidualMapping):
    """The identity mapping.

    It has no logits: phi has 2 n columns. (The choice of HY-V4, see its `transformers` module.).
    """

    name = "identity"

    def logits(self, n: int) -> int:  # noqa: ARG002 - the interface's signature
        """No logits."""
        return 0

    def init_preserve(self, n: int) -> Tensor:  # noqa: ARG002
        """An empty vector."""
        return torch.empty(0)

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """The identity for every token, [..., n, n]."""
        eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
        return eye.expand(*logits.shape[:-1], n, n).clone()

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """An empty gradient, [..., 0]."""
        return logits.new_zeros(logits.shape)

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """None."""
        return 0
