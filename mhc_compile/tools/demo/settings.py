"""The settings of a run: what a checkpoint must agree with to be continued. Torch is not imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MODELS", "STEPS", "Settings"]

MODELS = ("gpt2", "llama", "vit")
#: Steps of a run that does not say how many.
STEPS = 800
#: Width of an attention head in every model of the demo.
HEAD = 32
#: Bytes along the side of a patch of the vit's images.
PATCH = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers of a run, apart from its length.

    Attributes:
        model: "gpt2", "llama" or "vit".
        seed: of the initial weights, the batches and the dropout.
        batch: sequences (gpt2, llama) or images (vit) per step.
        context: bytes per sequence, or patches per image (a square number).
        layers: transformer blocks; each has two sites.
        width: C, a multiple of 32; heads are 32 wide.
        dropout: the probability, wherever the model's configuration has one.
        lr: the peak of the learning rate.
        inner: the compiler of both sides, "inductor", "aot_eager" or "eager".
    """

    model: str = "gpt2"
    seed: int = 0
    batch: int = 8
    context: int = 128
    layers: int = 4
    width: int = 128
    dropout: float = 0.0
    lr: float = 3e-3
    inner_backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.width % HEAD:
            raise OptionError(f"width is {self.width}; expected a multiple of {HEAD}, the width of an attention head")
        if self.model == "vit" and round(self.context**0.5) ** 2 != self.context:
            raise OptionError(f"context is {self.context}; --model vit expects a square number of patches such as 64")

    @classmethod
    def choose(cls, given: Mapping[str, Any]) -> Settings:
        """The settings with `given` on top of the defaults of the model that is asked for."""
        base: dict[str, Any] = {"batch": 16, "context": 64, "lr": 3e-4} if given.get("model") == "vit" else {}
        return cls(**{**base, **given})

    def contradictions(self, given: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """`(name, given, mine)` for every setting in `given` that differs from this one's."""
        mine = self.to_dict()
        return [(name, value, mine[name]) for name, value in given.items() if mine[name] != value]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the settings."""
        return [field.name for field in fields(cls)]
