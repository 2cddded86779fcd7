"""What `mhc_compile.stability` measured, as data; `table` and `plots` render it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import RenderableType

__all__ = ["ChainStability", "Geometry", "SiteStability", "Stability", "Weights"]

#: A matrix n × n, row by row.
Matrix = tuple[tuple[float, ...], ...]

#: Below this distance streams are copies of each other.
COPIES = 1e-6


@dataclass(frozen=True)
class Weights:
    """The distribution of pre or post over tokens, a number for each stream."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


@dataclass(frozen=True)
class Geometry:
    """How far the n streams of a token differ from each other, over all tokens.

    Attributes:
        similarity: mean cosine of two different streams: 1 for copies.
        effective_rank: exp of the entropy of the normalised singular values of the n × C matrix: 1 for copies, at most n.
        distance: root mean square of the streams' deviation from their mean, relative to the mean's: 0 for copies.
    """

    similarity: float
    effective_rank: float
    distance: float


@dataclass(frozen=True)
class SiteStability:
    """One site l of a chain 1 … L.

    H is its matrix H_res as it is applied, X' = H X + ...; an average is one over tokens. The composite is H_l ··· H_1, from the start of the
    chain up to and with this site; the remainder is H_L ··· H_l, from this site to the end. Forward is the largest absolute row sum, which bounds
    what a signal can grow by; backward is the largest absolute column sum, which bounds what a gradient can grow by; both of each token's matrix,
    averaged ("Amax gain magnitude", arXiv 2512.24880 v2, section 5.3; its figures show the remainder over l). A signal that enters the chain has
    gone through the composite here, a gradient that enters at its end has gone through the remainder: `composite_forward` and
    `remainder_backward` are their gains.

    Attributes:
        path: of the hyper-connection, as `mhc_compile.connections` has it.
        tokens: how many the figures are averaged over.
        mean: average H.
        spread: largest deviation of an entry of any token's H from `mean`: 0 while H is the same for all tokens.
        composite: average composite.
        remainder: average remainder.
        forward: of H alone.
        backward: of H alone.
        composite_forward: of the composite.
        composite_backward: of the composite.
        remainder_forward: of the remainder.
        remainder_backward: of the remainder.
        row_error: largest |row sum − 1| of any token's H.
        column_error: largest |column sum − 1| of any token's H.
        lowest: least entry of any token's H; below 0, H is not doubly stochastic.
        pre: weights with which the branch reads the streams; in a single pass, the next one. None where every channel has its own.
        post: weights with which the branch is written into the streams.
        entering: the streams that the site is given.
    """

    path: str
    tokens: int
    mean: Matrix
    spread: float
    composite: Matrix
    remainder: Matrix
    forward: float
    backward: float
    composite_forward: float
    composite_backward: float
    remainder_forward: float
    remainder_backward: float
    row_error: float
    column_error: float
    lowest: float
    pre: Weights | None
    post: Weights
    entering: Geometry

    @property
    def name(self) -> str:
        """The path without what is the same in all of them: `blocks.0.attn` for `blocks.0.mhc.attn`."""
        return ".".join(part for part in self.path.split(".") if part != "mhc")


@dataclass(frozen=True)
class ChainStability:
    """The sites of one chain, in the order in which a signal passes them.

    Attributes:
        streams: n.
        width: C.
        sites: at least one.
        leaving: the streams behind the last site.
        merged: the number of tokens changes along the chain (pooling, a class token): products over such a place are of averages.
    """

    streams: int
    width: int
    sites: tuple[SiteStability, ...]
    leaving: Geometry
    merged: bool

    @property
    def amax_forward(self) -> float:
        """Largest gain of a signal over depth: of `composite_forward`."""
        return _largest(site.composite_forward for site in self.sites)

    @property
    def amax_backward(self) -> float:
        """Largest gain of a gradient over depth: of `remainder_backward`."""
        return _largest(site.remainder_backward for site in self.sites)

    @property
    def geometry(self) -> tuple[Geometry, ...]:
        """Of the streams that enter each site and, last, of those that leave the chain."""
        return (*(site.entering for site in self.sites), self.leaving)

    @property
    def copies(self) -> bool:
        """Whether all streams are copies of each other throughout, so that the model computes what the plain one does."""
        return all(one.distance < COPIES for one in self.geometry)


@dataclass(frozen=True)
class Stability:
    """What `mhc_compile.stability` measured. Print it with rich, `plot` it, or read the fields.

    Attributes:
        model: class name.
        mode: "train" or "eval".
        dtype: of the streams, without "torch.".
        chains: in the order in which they begin.
        idle: paths of hyper-connections that had no part in the call.
    """

    model: str
    mode: str
    dtype: str
    chains: tuple[ChainStability, ...]
    idle: tuple[str, ...]

    @property
    def sites(self) -> tuple[SiteStability, ...]:
        """Of all chains."""
        return tuple(site for chain in self.chains for site in chain.sites)

    @property
    def amax_forward(self) -> float:
        """The largest of all chains; 1 is neither growth nor decay."""
        return _largest(chain.amax_forward for chain in self.chains)

    @property
    def amax_backward(self) -> float:
        """The largest of all chains; 1 is neither growth nor decay."""
        return _largest(chain.amax_backward for chain in self.chains)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader should know before the figures puzzle him, a sentence each."""
        found = []
        if self.chains and all(chain.copies for chain in self.chains):
            found.append(
                "All streams are copies of each other, and matrices whose rows sum to 1 keep them so: the model computes what the plain one does."
                " That is the start; streams separate as they are trained"
            )
        if self.sites and all(site.spread < COPIES for site in self.sites):
            found.append("H_res is the same for every token: phi does not reach it yet, as at the start")
        if any(chain.merged for chain in self.chains):
            found.append("The number of tokens changes along a chain: products over that place are of averages")
        if self.idle:
            found.append(
                f"{len(self.idle)} hyper-connections had no part in this call ({self.idle[0]}{', ...' if len(self.idle) > 1 else ''})"
            )
        return tuple(found)

    def summary(self) -> dict[str, float]:
        """The figures that a training should watch, by name: for a logger."""
        sites, ends = self.sites, [chain.leaving for chain in self.chains]
        if not sites:
            return {}
        return {
            "amax_forward": self.amax_forward,
            "amax_backward": self.amax_backward,
            "site_amax_forward": _largest(site.forward for site in sites),
            "site_amax_backward": _largest(site.backward for site in sites),
            "row_error": _largest(site.row_error for site in sites),
            "column_error": _largest(site.column_error for site in sites),
            "lowest": -_largest(-site.lowest for site in sites),
            "similarity": sum(end.similarity for end in ends) / len(ends),
            "effective_rank": sum(end.effective_rank for end in ends) / len(ends),
            "distance": _largest(one.distance for chain in self.chains for one in chain.geometry),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {schema, model, mode, dtype, chains: [{..., sites: [...]}], idle, summary, remarks}; the fields of the classes.

        Figures that are not finite are None.
        """
        data: dict[str, Any] = _finite(asdict(self))
        for chain, plain in zip(self.chains, data["chains"], strict=True):
            plain["amax_forward"], plain["amax_backward"] = _finite([chain.amax_forward, chain.amax_backward])
            for site, row in zip(chain.sites, plain["sites"], strict=True):
                row["name"] = site.name
        return (
            {"schema": "mhc-compile/stability/1"}
            | data
            | {"summary": _finite(self.summary()), "remarks": list(self.remarks)}
        )

    def plot(self, path: str | Path) -> None:
        """Writes a PNG: H_res and composites as heat maps, and gains, similarity and rank over depth.

        Raises:
            MhcError: matplotlib is not installed, or there is no chain to draw.
        """
        from mhc_compile.inspection.stream_stats.plots import write_png

        write_png(self, path)

    def __rich__(self) -> RenderableType:
        """What a rich console prints."""
        from mhc_compile.inspection.stream_stats.table import render

        return render(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from mhc_compile.reporting.html import html_of

        return html_of(self)


def _largest(values: Iterable[float]) -> float:
    """The largest, NaN if one of them is that, 1 if there is none."""
    known = list(values)
    return float("nan") if any(map(math.isnan, known)) else max(known, default=1.0)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
