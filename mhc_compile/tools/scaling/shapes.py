"""Sizes of decoders: the paper's, two public models', and a user's. Torch is not imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mhc_compile.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A pre-norm decoder with two residual adds a layer and a gated feed-forward branch."""

    name: str  # in tables
    layers: int  # blocks
    width: int  # C
    heads: int  # attention heads
    hidden: int  # width of the feed-forward branch; of one expert in a mixture
    head: int = 128  # width of a head's values, and without `latent` of its queries and keys
    groups: int = 0  # heads of keys and values that the others share; 0 for as many as `heads`
    latent: int = 0  # rank of keys and values in multi-head latent attention, 0 for ordinary attention
    query_latent: int = 0  # rank of its queries, 0 for none
    rotary: int = 64  # channels of its queries and keys that carry the position
    active: int = 1  # experts of one token, shared ones included; 1 for a dense model
    experts: int = 1  # all experts, shared ones included; 1 for a dense model
    dense: int = 0  # first layers without experts; their branch is as wide as `active` experts
    vocabulary: int = 129280  # rows of the embedding, and of a separate head
    tokens: int = 4096  # of one sequence; a pass runs one
    source: str = ""  # of the sizes

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "hidden", "head", "active", "experts", "vocabulary", "tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"shape {self.name!r}: {name} is {getattr(self, name)}; expected a positive integer")
        if self.groups and self.heads % self.groups:
            raise OptionError(
                f"shape {self.name!r}: {self.heads} heads do not share {self.groups} heads of keys evenly"
            )
        if self.active > self.experts:
            raise OptionError(f"shape {self.name!r}: {self.active} active experts of {self.experts}")

    @classmethod
    def of(cls, *, width: int, layers: int, heads: int | None = None, hidden: int | None = None, **sizes: Any) -> Shape:
        """Return a dense model; by default heads have 128 channels, `hidden` is about 8/3 C."""
        heads = max(1, width // 128) if heads is None else heads
        if heads < 1 or width % heads:
            raise OptionError(
                f"width {width} and {heads} heads: the heads do not divide the width. Name another number of heads"
            )
        hidden = max(64, round(8 * width / 3 / 64) * 64) if hidden is None else hidden
        head = width // heads
        return cls(name="yours", layers=layers, width=width, heads=heads, head=head, hidden=hidden, **sizes)


_PAPER: dict[str, Any] = {
    "latent": 512,
    "active": 8,
    "dense": 1,
    "source": "arXiv 2512.24880 v2 for layers, C and tokens; heads and experts are a guess that gives the totals, not the"
    " paper's table",
}
#: The sizes of the paper (its totals; the sizes of single experts are not from there), and two
#: public models above 100B, a dense one and a mixture of experts.
SHAPES = (
    Shape(name="mHC 3B", layers=12, width=1280, heads=16, hidden=896, experts=66, **_PAPER),
    Shape(name="mHC 9B", layers=18, width=1920, heads=24, hidden=1280, experts=66, **_PAPER),
    Shape(name="mHC 27B", layers=30, width=2560, heads=32, hidden=1536, experts=74, **_PAPER),
    Shape(
        name="Llama 3.1 405B", layers=126, width=16384, heads=128, groups=8, hidden=53248,
        vocabulary=128256, tokens=8192, source="arXiv 2407.21783, table 3",
    ),
    Shape(
        name="DeepSeek-V3 671B", layers=61, width=7168, heads=128, latent=512, query_latent=1536, hidden=2048,
        active=9, experts=257, dense=3, source="arXiv 2412.19437, section 4.2",
    ),
)  # fmt: skip
