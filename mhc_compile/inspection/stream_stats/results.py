"""The result of `mhc_compile.stability`, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.reporting.base import Renderable, export, finite

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: An n × n matrix, row by row.
Matrix = tuple[tuple[float, ...], ...]

#: Streams with a smaller distance are copies of each other.
_COPIES = 1e-6
#: Streams that are less far apart have hardly parted. In 24 layers, at .06 no gain in loss was
#: seen, from .1 on there was one (`examples/stability/results`).
_PARTED = 0.1


@dataclass(frozen=True)
class Weights:
    """Distribution of pre or post over tokens, with a number for each stream."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


@dataclass(frozen=True)
class Geometry:
    """How far the n streams of a token differ, over all tokens.

    `effective_rank` is exp of the entropy of the normalised singular values of the n × C matrix,
    `distance` the root mean square of the streams' deviation from their mean, relative to that of
    the mean.
    """

    similarity: float  #: mean cosine of two different streams: 1 for copies
    effective_rank: float  #: 1 for copies, at most n
    distance: float  #: 0 for copies


@dataclass(frozen=True)
class SiteStability:
    """One site l of a chain 1 … L.

    H is H_res as it is applied, X' = H X + ...; averages are over tokens. The composite is
    H_l ··· H_1, from the start of the chain through this site; the remainder is H_L ··· H_l, from
    this site to the end. "forward" is the largest absolute row sum, a bound on the growth of a
    signal; "backward" is the largest absolute column sum, a bound on the growth of a gradient; each
    of every token's matrix, then averaged ("Amax gain magnitude", arXiv 2512.24880 v2, section 5.3;
    its figures show the remainder over l). A signal from the start of the chain passes through the
    composite, a gradient from its end through the remainder: `composite_forward` and
    `remainder_backward` are their gains. A doubly stochastic composite has both at 1.
    """

    path: str  #: of the hyper-connection, as in `mhc_compile.connections`
    tokens: int  #: number of tokens
    mean: Matrix  #: average H
    spread: float  #: largest deviation of an entry of any token's H from `mean`: 0 if all tokens have the same H
    composite: Matrix  #: average composite
    remainder: Matrix  #: average remainder
    forward: float  #: of H alone, as `backward`
    backward: float
    composite_forward: float
    composite_backward: float
    remainder_forward: float
    remainder_backward: float
    row_error: float  #: largest |row sum − 1| of any token's H
    column_error: float  #: largest |column sum − 1| of any token's H
    lowest: float  #: smallest entry of any token's H; below 0, H is not doubly stochastic
    moved: float | None  #: root mean square change of pre, post or H_res since the start, the largest; None if unknown
    pre: Weights | None  #: to read the branch's input; in a single pass, the next one's; None if per channel
    post: Weights  #: to write the branch into the streams
    entering: Geometry  #: of the streams before the site

    @property
    def name(self) -> str:
        """The path without the part "mhc": `blocks.0.attn` for `blocks.0.mhc.attn`."""
        return ".".join(part for part in self.path.split(".") if part != "mhc")


@dataclass(frozen=True)
class ChainStability:
    """The sites of one chain, in the order of the signal."""

    streams: int  #: n
    width: int  #: C
    sites: tuple[SiteStability, ...]  #: at least one
    leaving: Geometry  #: of the streams after the last site
    merged: bool  #: the number of tokens changes on the way (pooling, a class token): products across are of averages

    @property
    def amax_forward(self) -> float:
        """Largest gain of a signal over depth: maximum of `composite_forward`."""
        return _largest(site.composite_forward for site in self.sites)

    @property
    def amax_backward(self) -> float:
        """Largest gain of a gradient over depth: maximum of `remainder_backward`."""
        return _largest(site.remainder_backward for site in self.sites)

    @property
    def geometry(self) -> tuple[Geometry, ...]:
        """Geometry of the streams before each site and after the last."""
        return (*(site.entering for site in self.sites), self.leaving)

    @property
    def copies(self) -> bool:
        """Whether all streams are copies, so that the model computes what the plain one does."""
        return all(one.distance < _COPIES for one in self.geometry)


@dataclass(frozen=True)
class Stability(Renderable):
    """Result of `mhc_compile.stability`. Print it with rich, `plot` it, or read the fields.

    Attributes:
        model: class name.
        mode: "train" or "eval".
        dtype: of the streams, without "torch.".
        chains: in the order in which they begin.
        idle: paths of hyper-connections that the call did not use.
    """

    model: str
    mode: str
    dtype: str
    chains: tuple[ChainStability, ...]
    idle: tuple[str, ...]

    @property
    def sites(self) -> tuple[SiteStability, ...]:
        """The sites of all chains."""
        return tuple(site for chain in self.chains for site in chain.sites)

    @property
    def amax_forward(self) -> float:
        """Maximum over all chains; 1 is neither growth nor decay."""
        return _largest(chain.amax_forward for chain in self.chains)

    @property
    def amax_backward(self) -> float:
        """Maximum over all chains; 1 is neither growth nor decay."""
        return _largest(chain.amax_backward for chain in self.chains)

    @property
    def distance(self) -> float:
        """Largest distance of the streams at any place."""
        return _largest(one.distance for chain in self.chains for one in chain.geometry)

    @property
    def moved(self) -> float | None:
        """Largest change of a site's gates since the start; None if it is unknown."""
        known = [site.moved for site in self.sites if site.moved is not None]
        return _largest(known) if known else None

    @property
    def close_streams(self) -> str:
        """A sentence if the streams have hardly parted, so that mixing them does little, or ""."""
        if not self.sites or self.distance >= _PARTED:
            return ""
        gates = "" if self.moved is None else f", and gates have moved by {self.moved:.3f} at most"
        return (
            f"The streams are {self.distance:.3f} of their mean apart at most{gates}: what the model computes is still"
            " close to plain residual adds. If it was trained, its hyper-connections had too little of it: more steps, a"
            " higher learning rate, a larger init_gain or gate_speed move them further (`mhc explain TARGET --lr LR --steps N` says how"
            " far)"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on the figures, a sentence each."""
        found = []
        if self.chains and all(chain.copies for chain in self.chains):
            found.append(
                "All streams are copies of each other, and matrices whose rows sum to 1 keep them so: the model computes"
                " what the plain one does. That is the start; streams separate as they are trained"
            )
        elif self.close_streams:
            found.append(self.close_streams)
        if self.sites and all(site.spread < _COPIES for site in self.sites):
            found.append("H_res is the same for every token: phi does not reach it yet, as at the start")
        if any(chain.merged for chain in self.chains):
            found.append("The number of tokens changes along a chain: products over that place are of averages")
        if self.idle:
            more = ", ..." if len(self.idle) > 1 else ""
            found.append(f"{len(self.idle)} hyper-connections had no part in this call ({self.idle[0]}{more})")
        return tuple(found)

    def summary(self) -> dict[str, float]:
        """Return the figures to log during training, by name."""
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
            "distance": self.distance,
            **({} if self.moved is None else {"moved": self.moved}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; figures that are not finite are None.

        {schema, model, mode, dtype, chains: [{..., sites: [...]}], idle, summary, remarks}, with
        the fields of the classes.
        """
        data = {"schema": "mhc-compile/stability/1", **asdict(self)}
        for chain, plain in zip(self.chains, data["chains"], strict=True):
            plain |= {"amax_forward": chain.amax_forward, "amax_backward": chain.amax_backward}
            for site, row in zip(chain.sites, plain["sites"], strict=True):
                row["name"] = site.name
        plain_data: dict[str, Any] = finite(data | {"summary": self.summary(), "remarks": self.remarks})
        return plain_data

    def plot(self, path: str | Path) -> None:
        """Write a PNG: H_res and composites as heat maps; gains, similarity and rank over depth.

        Raises:
            MhcError: matplotlib is not installed, or there is no chain to draw.
        """
        export(self, "png").savefig(path, format="png")


def _largest(values: Iterable[float]) -> float:
    """Return the maximum: NaN if any value is NaN, 1 if there is none."""
    known = list(values)
    return float("nan") if any(map(math.isnan, known)) else max(known, default=1.0)
