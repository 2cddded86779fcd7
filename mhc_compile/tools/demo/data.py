"""The data: the sources of Python's standard library, split by file, as batches for two tasks."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mhc_compile.errors import MhcError
from mhc_compile.tools.demo import PATCH, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

#: Folders that do not belong to the library itself.
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
#: One file in `HELD_OUT` is for validation. Classes of the image task. Batches of a validation.
HELD_OUT, PACKAGES, VALIDATION_BATCHES = 10, 8, 32


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def stable_seed(*parts: object) -> int:
    """Return a seed of 63 bits that depends on `parts` alone, in every process."""
    return int.from_bytes(_digest(":".join(map(str, parts)))[:8], "big") >> 1


def is_validation(path: str) -> bool:
    """Return whether a file is held out: a stable hash of its relative path decides."""
    return int.from_bytes(_digest(path)[:8], "big") % HELD_OUT == 0


def _joined(contents: Iterable[bytes]) -> Tensor:
    """Concatenate files, with a zero byte after each: uint8 [N]."""
    return torch.frombuffer(bytearray().join(content + b"\0" for content in contents), dtype=torch.uint8)


@dataclass(frozen=True)
class Split:
    """The files of one split: their bytes by path relative to the library, sorted."""

    contents: Mapping[str, bytes]

    @cached_property
    def data(self) -> Tensor:
        """All files, uint8 [N], with a zero byte after each."""
        return _joined(self.contents.values())

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw `count` pieces of bytes from random offsets: int64 [count, length]."""
        first = torch.randint(len(self.data) - length + 1, (count, 1), generator=generator)
        return self.data[first + torch.arange(length)].long()

    def by_package(self) -> dict[str, Tensor]:
        """Return the bytes of every package (top folder of the library), uint8 [N] each."""
        packages: dict[str, list[bytes]] = defaultdict(list)
        for path, content in self.contents.items():
            if "/" in path:
                packages[path.split("/")[0]].append(content)
        return {name: _joined(contents) for name, contents in packages.items()}


@dataclass(frozen=True)
class Corpus:
    """Training and validation files, and a digest of all names and contents."""

    train: Split
    validation: Split
    digest: str


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the `.py` files of the standard library of this Python, or of the folder `root`.

    CPython 3.11 has 12 MB without its tests.

    Raises:
        MhcError: there are too few files to split.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    paths: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    contents = {path: (root / path).read_bytes() for path in sorted(paths)}
    train = {path: content for path, content in contents.items() if not is_validation(path)}
    validation = {path: content for path, content in contents.items() if is_validation(path)}
    if not train or not validation:
        raise MhcError(
            f"found {len(contents)} Python files under {root}; expected the sources of a standard library to train on"
        )
    digest = hashlib.sha256()
    for path, content in contents.items():
        digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    return Corpus(Split(train), Split(validation), digest.hexdigest())


class NextByte:
    """Language modelling: inputs int64 [batch, context], targets the same bytes shifted by one.

    Batches are a pure function of the seed and the step. A uniform guess has loss `log(classes)`.
    """

    unit = "byte"
    classes = 256

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self.corpus, self.settings = corpus, settings

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of `step`."""
        return self._draw("train", step)

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return the validation batches, from files that are never trained on."""
        return [self._draw("validation", number) for number in range(VALIDATION_BATCHES)]

    def _draw(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        return self._batch(split, torch.Generator().manual_seed(stable_seed(split, self.settings.seed, number)))

    def _batch(self, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        files: Split = getattr(self.corpus, split)
        window = files.windows(self.settings.batch, self.settings.context + 1, generator)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


class Package(NextByte):
    """Classification of pieces of source by the package that they come from.

    A piece of `side²` bytes, read row by row, is an image float32 [batch, 1, side, side] in [-1,
    1]; side² is 4096 with the default 64 patches of 8 × 8. The target int64 [batch] is one of the
    eight packages with the most files. Packages are drawn uniformly, pieces from random offsets in
    the package's files of the split.
    """

    unit = "patch"

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        super().__init__(corpus, settings)
        self.side = PATCH * math.isqrt(settings.context)
        self._bytes = {"train": corpus.train.by_package(), "validation": corpus.validation.by_package()}
        files = Counter(path.split("/")[0] for path in corpus.train.contents if "/" in path)
        by_size = sorted(files, key=lambda name: (-files[name], name))
        fits = [n for n in by_size if all(len(split.get(n, ())) >= self.side**2 for split in self._bytes.values())]
        self.packages = tuple(fits[:PACKAGES])
        self.classes = len(self.packages)

    def _batch(self, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        targets = torch.randint(self.classes, (self.settings.batch,), generator=generator)
        length = self.side**2
        images = []
        for target in targets.tolist():
            data = self._bytes[split][self.packages[target]]
            first = int(torch.randint(len(data) - length + 1, (), generator=generator))
            images.append(data[first : first + length].view(1, self.side, self.side))
        return torch.stack(images).float() / 127.5 - 1.0, targets


def make_task(corpus: Corpus, settings: Settings) -> NextByte:
    """Return the task of `settings.model`."""
    return Package(corpus, settings) if settings.model == "vit" else NextByte(corpus, settings)
