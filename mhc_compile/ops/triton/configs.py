"""Sizes of blocks, warps and stages, from a table: the same on every rank and in every run.

Another choice would add up in another order. The tables are by the bytes of a number and the number
of streams; a range of T only chooses how many programs share the work, which is no constant of a
kernel. `MHC_TRITON_CONFIGS=FILE` replaces entries with those of `mhc bench --tune FILE`, the
same on every rank, so that all add up in one order again. Caches of graphs do not depend on it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from mhc_compile.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._shapes import Sizes

_DTYPES = {"bfloat16": "bfloat16", "bfloat16 interpreted": "bfloat16", "tf32": "float16", "tf32x3": "float32"}
#: Kernels and their second kind of blocks; the others go by the warps that the table gives them.
_BLOCKS = {"forward": ("read",), "backward": ("dot",), "mixing_4": (), "mixing_8": ()}
#: What constants may be.
SIZES = (16, 32, 64, 128, 256, 512)
OTHERS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5, 6), "maxnreg": (64, 96, 128, 168, None)}


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


#: While configurations are tried: returns the one for the name of a kernel, from that in use.
CHOOSER: Callable[[str, Config], Config] | None = None


def checked(name: str, constants: dict[str, Any]) -> Config:
    """Return a kernel's constants as its configuration; ValueError if no launch takes them."""
    if (more := _BLOCKS.get(name.split(" ")[0])) is None:
        raise ValueError(f"kernel {name!r}; expected one of {', '.join(_BLOCKS)}")
    expected = {f"{block}_{axis}": SIZES for block in ("block", *more) for axis in ("tokens", "channels")} | OTHERS
    wrong = {key: one for key, one in constants.items() if repr(one) not in map(repr, expected.get(key, ()))}
    if wrong or len(constants) < len(expected) or constants.get("read_tokens", 0) > constants["block_tokens"]:
        raise ValueError(f"{name}: {wrong or constants}; expected {expected}, and read_tokens <= block_tokens")
    return Config({k: constants[k] for k in expected if k not in OTHERS}, **{k: constants[k] for k in OTHERS})


def head() -> dict[str, Any]:
    """Return a file without kernels: what its configurations are for."""
    gpu = torch.cuda.get_device_properties("cuda") if torch.cuda.is_available() else None
    card = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}" if gpu else "no GPU"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"schema": "mhc-compile/triton-configs/1", "card": card, **versions, "kernels": {}}


@functools.cache
def from_file() -> dict[str, Config]:
    """Return the configurations of the file by kernel; OptionError for one that is not for here."""
    if not (path := os.environ.get("MHC_TRITON_CONFIGS")):
        return {}
    try:
        data = json.loads(Path(path).read_text())
        if (found := {**data, "kernels": {}}) != head():
            raise ValueError(f"it is for {found}, and here is {head()}")
        return {name: checked(name, one["config"]) for name, one in data["kernels"].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise OptionError(f"MHC_TRITON_CONFIGS={path}: {error!r}; unset it, or write it by mhc bench --tune") from error


def _choose(kernel: str, sizes: Sizes, config: Config, shifted: bool = False, norm: str = "") -> Config:
    if not (CHOOSER or from_file()):
        return config
    words = kernel, f"n={sizes.n}", _DTYPES[sizes.precision], f"C={sizes.width}", sizes.convention.mapping
    config = from_file().get(name := " ".join(filter(None, (*words, "shifted" * shifted, norm))), config)
    return CHOOSER(name, config) if CHOOSER else config


#: Work that is under way at once on the largest GPU: two programs on each of 132 processors.
_AT_ONCE = 264


def forward(sizes: Sizes, shifted: bool = False, norm: str = "") -> Config:
    """Return the configuration of `forward_kernel`, of which `shifted` and `norm` are constants.

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
    return _choose("forward", sizes, Config(blocks, 8, num_stages=2, maxnreg=128 if few else None), shifted, norm)


def backward(sizes: Sizes, shifted: bool = False, norm: str = "") -> Config:
    """Return the configuration of `backward_kernel`, likewise.

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
    return _choose("backward", sizes, Config(blocks, num_warps=8, num_stages=2), shifted, norm)


def mixing(sizes: Sizes, num_warps: int = 4) -> dict[str, Any]:
    """Return block sizes of about 2048 elements of a stream, for the kernels without projection."""
    channels = sizes.channels(128)
    tokens = 2048 // channels if channels >= 64 else 16
    table = Config({"block_tokens": tokens, "block_channels": channels}, num_warps, num_stages=3)
    return _choose(f"mixing_{num_warps}", sizes, table).constants


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
