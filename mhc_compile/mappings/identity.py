"""H_res = I: streams are not mixed, branches read and write them with weights (`pre`, `post`)."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping


class Identity(ResidualMapping):
    """The identity mapping, without logits: phi has 2 n columns. HY-V4 uses it."""

    name = "identity"

    def logits(self, n: int) -> int:  # noqa: ARG002 - the interface's signature
        """Return 0."""
        return 0

    def init_preserve(self, n: int) -> Tensor:  # noqa: ARG002
        """Return an empty vector."""
        return torch.empty(0)

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Return the identity for every token, [..., n, n]."""
        eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
        return eye.expand(*logits.shape[:-1], n, n).clone()

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        """Return an empty gradient, [..., 0]."""
        return logits.new_zeros(logits.shape)
