"""Sizes of blocks, warps and stages, from a table: the same on every rank and in every run.

Another choice would add up in another order. The tables are by the bytes of a number and the number
of streams; a range of T only chooses how many programs share the work, which is no constant of a
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton

if TYPE_CHECKING:
    from ._shapes import Sizes


@dataclass(frozen=True)
class Config:
    """Constants of a kernel, and how it is compiled: `maxnreg` is the limit of its registers."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def constants(self) -> dict[str, int | None]:
        """All as arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


#: Work that is under way at once on the largest GPU: two programs on each of 132 processors.
_AT_ONCE = 264


def forward(sizes: Sizes) -> Config:
    """Return the configuration of `forward_kernel`.

    Up to n = 4 it has 128 registers a thread: two programs on a processor. In bfloat16 a tile of
    128 tokens is that of two matrix units; 32 channels of half as many would be held in registers
    that there are not.
    """
    few, narrow = sizes.n <= 4, sizes.precision.startswith("bfloat16")
    blocks = {
        "block_tokens": (128 if narrow else 64) if few else 32,
        "block_channels": sizes.channels(16),
        "read_tokens": 16,
        "read_channels": sizes.channels(128 if few else 64),
    }
    return Config(blocks, num_warps=8, num_stages=2, maxnreg=128 if few else None)


def backward(sizes: Sizes) -> Config:
    """Return the configuration of `backward_kernel`.

    A thread of the second walk has 16 bytes of every stream: its scalar products are then half as
    many instructions as with 8 bytes.
    """
    few, narrow = sizes.n <= 4, sizes.itemsize == 2
    blocks = {
        "block_tokens": 16,
        "block_channels": sizes.channels((128 if narrow else 64) if few else 32),
        "dot_tokens": 32,
        "dot_channels": sizes.channels(64 if few else 32),
    }
    return Config(blocks, num_warps=8, num_stages=2)


def mixing(sizes: Sizes, num_warps: int = 4) -> dict[str, Any]:
    """Return block sizes of about 2048 elements of a stream, for the kernels without projection."""
    channels = sizes.channels(128)
    tokens = 2048 // channels if channels >= 64 else 16
    return {"block_tokens": tokens, "block_channels": channels, "num_warps": num_warps}


@dataclass(frozen=True)
class Work:
    """How a walk over [T, C] is cut.

    Attributes:
        tiles: of tokens.
        parts: pieces of the channels.
        each: blocks of channels of a piece.
        lag: tiles (or groups of tiles) between the first walk and the second.
    """

    tiles: int
    parts: int
    each: int
    lag: int


def cut(tokens: int, width: int, block_tokens: int, block_channels: int, second: int) -> Work:
    """Return how many programs share the channels of a tile.

    A piece has at least 256 channels, and fewer where there are not tokens enough to keep a GPU
    busy. `second` is the number of programs of the second walk over a tile, which begins when all
    of the first walk's that began before have had the time to finish.
    """
    tiles = triton.cdiv(tokens, block_tokens)
    blocks = triton.cdiv(width, block_channels)
    wanted = max(triton.cdiv(width, 256), min(blocks, triton.cdiv(_AT_ONCE, max(tiles, 1))))
    each = triton.cdiv(blocks, wanted)
    parts = triton.cdiv(blocks, each)
    lag = min(triton.cdiv(_AT_ONCE, parts + second), tiles) if second else 0
    return Work(tiles, parts, each, lag)
