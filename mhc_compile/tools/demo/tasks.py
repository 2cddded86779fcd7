"""What is learned: the next byte of a source file, or the package that a picture of 4 kB of source comes from."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

import torch

from mhc_compile.tools.demo.settings import PATCH, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.tools.demo.corpus import Corpus, Split

__all__ = ["NextByte", "Package", "Task", "make_task", "stable_seed"]

#: Packages that the images are told apart by: the ones with the most files.
PACKAGES = 8
#: Batches that a validation loss is the mean of; the same ones at every step.
VALIDATION_BATCHES = 8


def stable_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on `parts` alone, so that a step can be repeated by another process."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


class Task(ABC):
    """Batches as a pure function of the seed and the step.

    Attributes:
        unit: what the model's sequence is made of.
        classes: number of classes; a guess costs `log(classes)`.
    """

    unit: ClassVar[str]
    classes: int

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self.corpus = corpus
        self.settings = settings

    @property
    def tokens(self) -> int:
        """Positions that one step trains on."""
        return self.settings.batch * self.settings.context

    @property
    def chance(self) -> float:
        """Loss of a uniform guess, in nats."""
        return math.log(self.classes)

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`."""
        return self._draw(self.corpus.train, "train", step)

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """The validation batches, from files that are never trained on."""
        return [self._draw(self.corpus.validation, "validation", number) for number in range(VALIDATION_BATCHES)]

    def _draw(self, split: Split, name: str, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stable_seed(name, self.settings.seed, number))
        return self._batch(split, generator)

    @abstractmethod
    def _batch(self, split: Split, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...


class NextByte(Task):
    """Language modelling on bytes: inputs int64 [batch, context], targets the same bytes shifted by one."""

    unit = "byte"
    classes = 256

    def _batch(self, split: Split, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        window = split.windows(self.settings.batch, self.settings.context + 1, generator)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


class Package(Task):
    """Classification of pieces of source by the package that they come from.

    A piece of `side²` bytes, read row by row, is an image float32 [batch, 1, side, side] in [-1, 1]; side² is 4096 with
    the default 64 patches of 8 × 8. The target int64 [batch] is one of the eight packages of the library with the most
    files. Packages are drawn uniformly, pieces from anywhere in the package's files of the split; validation files are
    never trained on, so what is measured is the look of a package.
    """

    unit = "patch"

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        super().__init__(corpus, settings)
        self.side = PATCH * math.isqrt(settings.context)
        train, held_out = (self._bytes_of(split) for split in (corpus.train, corpus.validation))
        files = Counter(path.split("/")[0] for path in corpus.train.files if "/" in path)
        large = [
            name
            for name, _ in sorted(files.items(), key=lambda item: (-item[1], item[0]))
            if self._fits(name, train, held_out)
        ]
        self.packages = tuple(large[:PACKAGES])
        self.classes = len(self.packages)
        self._pieces = {id(corpus.train): train, id(corpus.validation): held_out}

    def _fits(self, name: str, *splits: dict[str, Tensor]) -> bool:
        return all(len(split.get(name, ())) >= self.side**2 for split in splits)

    def _bytes_of(self, split: Split) -> dict[str, Tensor]:
        ends = (*split.starts[1:], len(split.data))
        parts: dict[str, list[Tensor]] = {}
        for path, start, end in zip(split.files, split.starts, ends, strict=True):
            if "/" in path:
                parts.setdefault(path.split("/")[0], []).append(split.data[start:end])
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    def _batch(self, split: Split, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        targets = torch.randint(self.classes, (self.settings.batch,), generator=generator)
        length = self.side**2
        images = []
        for target in targets.tolist():
            data = self._pieces[id(split)][self.packages[target]]
            first = int(torch.randint(len(data) - length + 1, (), generator=generator))
            images.append(data[first : first + length].view(1, self.side, self.side))
        return torch.stack(images).float() / 127.5 - 1.0, targets


def make_task(corpus: Corpus, settings: Settings) -> Task:
    """The task of `settings.model`."""
    return Package(corpus, settings) if settings.model == "vit" else NextByte(corpus, settings)
