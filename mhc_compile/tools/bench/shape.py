"""What is measured: the sizes that every contender is built for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model and of one site. Batch is 1.

    Attributes:
        width: C, a multiple of 2.
        layers: transformer blocks; each has two sites.
        tokens: T, the sequence.
        vocabulary: rows of the tied embedding.
        streams: n.
        iterations: of Sinkhorn.
        device: "cpu" or "cuda".
        dtype: of trunk, streams and blocks, by its torch name. Coefficients and their parameters are float32.
    """

    width: int = 256
    layers: int = 4
    tokens: int = 1024
    vocabulary: int = 50257
    streams: int = 4
    iterations: int = 20
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def sites(self) -> int:
        """Residual adds of the model: attention and MLP of every block."""
        return 2 * self.layers

    @property
    def heads(self) -> int:
        """Attention heads: 64 channels each, as in GPT-2; one head where the width is no multiple of that."""
        return self.width // 64 if self.width % 64 == 0 else 1

    @property
    def coefficients(self) -> int:
        """n² + 2n, the columns of the projection of one site."""
        return self.streams**2 + 2 * self.streams

    @property
    def real(self) -> torch.dtype:
        """The dtype itself."""
        value = getattr(torch, self.dtype)
        assert isinstance(value, torch.dtype)
        return value
