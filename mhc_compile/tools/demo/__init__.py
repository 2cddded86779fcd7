"""`mhc demo`: train one small transformer twice, plain and with hyper-connections.

data -> train -> report; `session` runs them, with a checkpoint and Ctrl-C, and `seeds` runs further
seeds at the same time. The settings are here, without torch, so that `mhc demo --help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS = ("gpt2", "llama", "vit")
#: Steps of a run by default, width of an attention head, side of a patch of the vit's images in
#: bytes.
STEPS, HEAD, PATCH = 400, 32, 8
#: Seeds by default: that of the settings and those after it.
SEEDS = 2
#: Files in the folder of a run; the last one is of what a process without a terminal prints.
RESULT, PICTURE, CHECKPOINT, LOG = "result.json", "loss.png", "checkpoint.pt", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a run, apart from its length.

    Raises:
        OptionError: `width` is no multiple of 32, or `context` of a vit is no square number.
    """

    model: str = "gpt2"  # "gpt2", "llama" or "vit"
    seed: int = 0  # of the initial weights, the batches and the dropout
    batch: int = 4  # sequences, or images of the vit, per step
    context: int = 64  # bytes per sequence, or patches per image (a square number)
    layers: int = 12  # transformer blocks; each has two sites
    width: int = 64  # C, a multiple of 32
    dropout: float = 0.0  # the probability, wherever the model's configuration has one
    lr: float = 2e-3  # the peak of the learning rate
    inner_backend: str = "inductor"  # the compiler of both models

    def __post_init__(self) -> None:
        if self.width % HEAD:
            raise OptionError(f"width is {self.width}; expected a multiple of {HEAD}, the width of an attention head")
        if self.model == "vit" and round(self.context**0.5) ** 2 != self.context:
            raise OptionError(f"context is {self.context}; --model vit expects a square number of patches such as 64")

    @classmethod
    def choose(cls, given: Mapping[str, Any]) -> Settings:
        """Return the settings with `given` on top of the defaults of the chosen model."""
        base: dict[str, Any] = (
            {"batch": 16, "layers": 4, "width": 128, "lr": 3e-4} if given.get("model") == "vit" else {}
        )
        return cls(**{**base, **given})
