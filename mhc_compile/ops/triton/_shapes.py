"""`Sizes`: the sizes and the convention for which kernels are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.errors import OptionError, ShapeError
from mhc_compile.mappings import columns as columns_of

from .coverage import MAPPINGS
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


def numbers(like: Tensor, *shape: int) -> Tensor:
    """Return a new float32 tensor on the device of another."""
    return like.new_empty(shape, dtype=torch.float32)


def flat_or(tensor: Tensor | None, axes: int, nothing: Tensor) -> Tensor:
    """Return `flat` of a tensor, and for an absent one a tensor without numbers."""
    return nothing if tensor is None else flat(tensor, axes)


def vector(tensor: Tensor | None) -> Tensor | None:
    """Return a gain or shift [C] for a kernel, for which one that is None is a constant."""
    return None if tensor is None else tensor.contiguous()


@dataclass(frozen=True)
class Sizes:
    """Sizes of one site: n streams of width C that have m sources, and K columns of phi.

    The sources are the streams that are held (n, or 1) and the outputs of `older` branches.
    """

    n: int
    m: int
    older: int
    width: int
    columns: int
    itemsize: int
    precision: str
    convention: Convention

    @classmethod
    def of(cls, streams: Tensor, n: int, mapping: str = "sinkhorn", *, older: int = 0) -> Sizes:
        """Return the sizes for `streams` [..., n or 1, C].

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
        convention = parse(mapping)
        if convention.mapping not in MAPPINGS or convention.rank:
            raise OptionError(f"{what}; mapping {mapping!r} has no kernel, only {', '.join(MAPPINGS)} have")
        precision = _PRECISIONS[streams.dtype]
        if interpreted() and precision == "bfloat16":
            precision = "bfloat16 interpreted"
        columns = columns_of(convention.mapping, n)
        assert columns is not None, (mapping, n)
        return cls(n, int(m) + older, older, int(width), columns, streams.element_size(), precision, convention)

    @property
    def halves(self) -> int:
        """Number of pieces of a float32 operand."""
        return 2 if self.precision.startswith("bfloat16") else 1

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of every kernel that computes coefficients."""
        convention = self.convention
        return {
            "mapping": convention.mapping,
            # Settings that other mappings ignore make no new kernel.
            "sinkhorn_eps": convention.sinkhorn_eps if convention.mapping == "sinkhorn" else 0.0,
            "turns": convention.mapping == "sinkhorn" and convention.last == "columns",
            "pre_eps": convention.pre_eps,
            "post_range": float(convention.post_range),
            "post_eps": convention.post_eps,
            "gate_speed": float(convention.gate_speed),
            "scale_speed": float(convention.scale_speed),
        }

    @property
    def thin(self) -> int:
        """K padded for a matrix unit."""
        return max(16, power_of_two(self.columns))

    def channels(self, most: int) -> int:
        """Return a block of channels: `most`, or less for narrow streams."""
        return min(most, max(16, power_of_two(self.width)))
