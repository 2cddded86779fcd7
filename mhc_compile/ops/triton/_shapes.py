"""`Sizes`: the sizes for which kernels are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mhc_compile.errors import OptionError, ShapeError
from mhc_compile.mappings import get_mapping

from .launch import interpreted

if TYPE_CHECKING:
    from torch import Tensor

#: More streams than this would not fit the registers of a program.
LARGEST = 8
#: How the thin products are made. bfloat16 streams are multiplied with coefficients in two bfloat16
#: halves: more exact than tf32, and no slower. float16 streams are exact in tf32.
_PRECISIONS = {torch.bfloat16: "bfloat16", torch.float16: "tf32", torch.float32: "tf32x3"}


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def flat(tensor: Tensor, axes: int) -> Tensor:
    """Flatten all axes but the last `axes`, contiguously."""
    return tensor.reshape(-1, *tensor.shape[tensor.dim() - axes :]).contiguous()


@dataclass(frozen=True)
class Sizes:
    """Sizes of one site: n streams of width C, m of them held (n, or 1), and K columns of phi."""

    n: int
    m: int
    width: int
    columns: int
    precision: str

    @classmethod
    def of(cls, streams: Tensor, n: int, mapping: str | None = None) -> Sizes:
        """Return the sizes for `streams` [..., m, C].

        Raises:
            ShapeError: no kernel takes this dtype or number of streams.
            OptionError: no kernel takes this mapping.
        """
        m, width = streams.shape[-2:]
        what = f"triton kernels: streams {list(streams.shape)} {str(streams.dtype).removeprefix('torch.')}, n = {n}"
        if streams.dtype not in _PRECISIONS:
            raise ShapeError(f"{what}; expected float32, bfloat16 or float16")
        if not 1 <= n <= LARGEST or m not in (1, n):
            raise ShapeError(f"{what}; expected 1 <= n <= {LARGEST}, and n or 1 streams")
        if mapping not in (None, "sinkhorn", "identity"):
            raise OptionError(f"{what}; mapping {mapping!r} has no kernel, only 'sinkhorn' and 'identity' have")
        columns = 2 * n + (get_mapping(mapping).logits(n) if mapping else 0)
        precision = _PRECISIONS[streams.dtype]
        if interpreted() and precision == "bfloat16":
            precision = "bfloat16 interpreted"
        return cls(n, int(m), int(width), columns, precision)

    @property
    def halves(self) -> int:
        """Number of pieces of a float32 operand."""
        return 2 if self.precision.startswith("bfloat16") else 1

    @property
    def size(self) -> int:
        """N padded to a power of two."""
        return power_of_two(self.n)

    @property
    def held(self) -> int:
        """M padded to a power of two."""
        return power_of_two(self.m)

    def thin(self, halves: int) -> int:
        """Return `halves` K padded for a matrix unit."""
        return max(16, power_of_two(halves * self.columns))

    @property
    def dots(self) -> int:
        """Scalar products per token, with branch and held streams, padded to a power of two."""
        return power_of_two(self.n + self.n * self.m)

    def channels(self, most: int) -> int:
        """Return a block of channels: `most`, or less for narrow streams."""
        return min(most, max(16, power_of_two(self.width)))
