"""Sizes of decoders: those of the paper, public ones above 100B, and one's own. Torch is not imported here."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_compile.errors import OptionError

__all__ = ["SHAPES", "Shape"]

_MHC = "arXiv 2512.24880 v2 for layers, C and tokens; heads and experts are a guess that gives the totals, not the paper's table"
_LLAMA = "arXiv 2407.21783, table 3"
_V3 = "arXiv 2412.19437, section 4.2"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A pre-norm decoder with two residual adds a layer and a gated feed-forward branch.

    Attributes:
        name: in tables.
        layers: blocks.
        width: C.
        heads: attention heads.
        head: width of a head's values; of its queries and keys as well, without `latent`.
        groups: heads of keys and values that the others share; 0 for as many as `heads`.
        latent: rank of keys and values in multi-head latent attention, 0 for ordinary attention.
        query_latent: rank of its queries, 0 for none.
        rotary: channels of its queries and keys that carry the position.
        hidden: width of the feed-forward branch; of one expert in a mixture.
        active: experts that a token runs through, shared ones among them; 1 for a dense model.
        experts: all experts, shared ones among them; 1 for a dense model.
        dense: layers at the beginning without experts. Their feed-forward branch is taken as wide as `active` experts.
        vocabulary: rows of the embedding, and of a head of its own.
        tokens: of one sequence; a pass runs one.
        source: where the sizes are from.
    """

    name: str
    layers: int
    width: int
    heads: int
    hidden: int
    head: int = 128
    groups: int = 0
    latent: int = 0
    query_latent: int = 0
    rotary: int = 64
    active: int = 1
    experts: int = 1
    dense: int = 0
    vocabulary: int = 129280
    tokens: int = 4096
    source: str = ""

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
    def of(
        cls,
        *,
        width: int,
        layers: int,
        tokens: int = 4096,
        heads: int | None = None,
        hidden: int | None = None,
        vocabulary: int = 129280,
    ) -> Shape:
        """A dense model of one's own: heads of 128 channels and `hidden` of 8/3 C, a multiple of 64, unless they are given."""
        heads = max(1, width // 128) if heads is None else heads
        if heads < 1 or width % heads:
            raise OptionError(
                f"width {width} and {heads} heads: the heads do not divide the width. Name another number of heads"
            )
        return cls(
            name="yours",
            layers=layers,
            width=width,
            heads=heads,
            head=width // heads,
            hidden=max(64, round(8 * width / 3 / 64) * 64) if hidden is None else hidden,
            vocabulary=vocabulary,
            tokens=tokens,
        )

    @property
    def attention(self) -> int:
        """Weights of one attention branch."""
        values = self.heads * self.head
        if not self.latent:
            keys = (self.groups or self.heads) * self.head
            return self.width * (2 * values + 2 * keys)
        wide = self.heads * (self.head + self.rotary)
        queries = self.width * self.query_latent + self.query_latent * wide if self.query_latent else self.width * wide
        return (
            queries
            + self.width * (self.latent + self.rotary)
            + self.latent * self.heads * 2 * self.head
            + self.width * values
        )

    def parameters(self, *, active: bool = False) -> int:
        """Matrices of the plain model; with `active`, those that one token runs through. Norms, biases and routers are left out."""
        expert = 3 * self.width * self.hidden
        sparse, dense = self.layers - self.dense, self.dense
        feed = expert * (sparse * (self.active if active else self.experts) + dense * self.active)
        return self.layers * self.attention + feed + 2 * self.vocabulary * self.width


#: The sizes of the paper (how their experts are cut is not from there, its totals are), and two public models above 100B, a dense one and a
#: mixture of experts.
SHAPES = (
    Shape(
        name="mHC 3B", layers=12, width=1280, heads=16, hidden=896, latent=512,
        active=8, experts=66, dense=1, source=_MHC,
    ),
    Shape(
        name="mHC 9B", layers=18, width=1920, heads=24, hidden=1280, latent=512,
        active=8, experts=66, dense=1, source=_MHC,
    ),
    Shape(
        name="mHC 27B", layers=30, width=2560, heads=32, hidden=1536, latent=512,
        active=8, experts=74, dense=1, source=_MHC,
    ),
    Shape(
        name="Llama 3.1 405B", layers=126, width=16384, heads=128, groups=8, hidden=53248,
        vocabulary=128256, tokens=8192, source=_LLAMA,
    ),
    Shape(
        name="DeepSeek-V3 671B", layers=61, width=7168, heads=128, latent=512, query_latent=1536, hidden=2048,
        active=9, experts=257, dense=3, source=_V3,
    ),
)  # fmt: skip
