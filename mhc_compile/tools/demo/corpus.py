"""Real text that every Python has: the sources of its standard library, as bytes, split by file."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LIMIT", "Corpus", "Split", "is_validation", "load_corpus"]

#: Bytes that are read at most. The library of CPython 3.11 without its tests has 12 MB.
LIMIT = 16_000_000
#: Folders that are not the library itself.
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
#: One file in so many is for validation.
HELD_OUT = 10


def _digest(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def is_validation(path: str) -> bool:
    """Whether the file at `path` (relative to the library, with `/`) is held out: a stable hash of the path decides."""
    return int.from_bytes(_digest(path)[:8], "big") % HELD_OUT == 0


@dataclass(frozen=True)
class Split:
    """Some of the files.

    Attributes:
        files: their paths, relative to the library.
        starts: where each begins in `data`.
        data: uint8 [N], their bytes one after the other, a zero byte behind each.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]
    data: Tensor

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` pieces of `length` bytes from anywhere: int64 [count, length], values 0 to 255."""
        first = torch.randint(len(self.data) - length + 1, (count, 1), generator=generator)
        return self.data[first + torch.arange(length)].long()


@dataclass(frozen=True)
class Corpus:
    """Training and validation files. The digest of all names and contents tells two versions of Python apart."""

    train: Split
    validation: Split
    digest: str


def load_corpus(root: Path | None = None, limit: int = LIMIT) -> Corpus:
    """Reads the `.py` files of the standard library of the running interpreter.

    Args:
        root: another folder to read instead.
        limit: bytes to read at most. Files are taken in the order of the hash of their paths, so a smaller limit is a
            fair sample.

    Raises:
        MhcError: there are no files to split.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    chosen: dict[str, bytes] = {}
    size = 0
    for path in sorted(_sources(root), key=lambda path: _digest(path)[8:]):
        content = (root / path).read_bytes()
        if size + len(content) <= limit:
            chosen[path] = content
            size += len(content)
    train = [path for path in sorted(chosen) if not is_validation(path)]
    validation = [path for path in sorted(chosen) if is_validation(path)]
    if not train or not validation:
        raise MhcError(
            f"found {len(chosen)} Python files under {root}; expected the sources of a standard library to train on"
        )
    digest = hashlib.sha256()
    for path in sorted(chosen):
        digest.update(path.encode() + b"\0" + hashlib.sha256(chosen[path]).digest())
    return Corpus(_join(train, chosen), _join(validation, chosen), digest.hexdigest())


def _sources(root: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return found


def _join(paths: list[str], contents: dict[str, bytes]) -> Split:
    starts, joined = [], bytearray()
    for path in paths:
        starts.append(len(joined))
        joined += contents[path] + b"\0"
    return Split(tuple(paths), tuple(starts), torch.frombuffer(joined, dtype=torch.uint8))
