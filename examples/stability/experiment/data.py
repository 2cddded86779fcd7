"""Batches as a function of the seed and the step: every variant sees the same bytes in the same order."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mhc_compile.tools.demo.data import load_corpus, stable_seed

if TYPE_CHECKING:
    from torch import Tensor

    from experiment.plan import Plan
    from mhc_compile.tools.demo.data import Split

__all__ = ["Batches"]


class Batches:
    """Pieces of the standard library's sources; a pair is ids and targets, int64 [batch, length] each, one byte apart."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.corpus = load_corpus()

    def training(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one step."""
        return self._draw(self.corpus.train, "stability", "train", seed, step)

    @cached_property
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """From files that are never trained on; the same for all seeds."""
        return [self._draw(self.corpus.validation, "stability", "held out", i) for i in range(self.plan.held_out)]

    def _draw(self, split: Split, *key: object) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stable_seed(*key))
        window = split.windows(self.plan.batch, self.plan.length + 1, generator)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()
