"""The figures of one site: reductions of its matrices, weights and streams, all in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from mhc_compile.inspection.stream_stats.result import Geometry, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Amax", "amax", "geometry", "rows", "weights"]

#: Entries of streams that are looked at in float64 at one time: 32 MB.
_CHUNK = 1 << 22


class Amax(NamedTuple):
    """Largest absolute row sum (forward) and column sum (backward) of matrices, averaged over tokens."""

    forward: float
    backward: float


def amax(matrices: Tensor) -> Amax:
    """The gains of matrices [tokens, n, n]. Source: arXiv 2512.24880 v2, section 5.3, "Amax gain magnitude"."""
    absolute = matrices.abs()
    return Amax(absolute.sum(-1).amax(-1).mean().item(), absolute.sum(-2).amax(-1).mean().item())


def rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    """A matrix [n, n] as numbers."""
    return tuple(tuple(row) for row in matrix.tolist())


def weights(values: Tensor) -> Weights:
    """The distribution over tokens of pre or post, [..., n]."""
    wide = values.detach().flatten(0, -2).cpu().double()
    return Weights(
        tuple(wide.mean(0).tolist()),
        tuple(wide.std(0, correction=0).tolist()),
        tuple(wide.amin(0).tolist()),
        tuple(wide.amax(0).tolist()),
    )


def geometry(streams: Tensor) -> Geometry:
    """How far the streams [..., n, C] of a token differ from each other.

    Tokens whose streams are all zero (padding) have no direction and are left out of similarity and rank. Values that are not finite give NaN.
    """
    n, width = streams.shape[-2:]
    flat = streams.detach().reshape(-1, n, width)
    size = max(_CHUNK // max(n * width, 1), 1)
    deviation = trunk = 0.0
    grams = []
    for part in flat.split(size):
        wide = (part.cpu() if part.device.type == "mps" else part).double()  # there is no float64 on mps
        mean = wide.mean(-2, keepdim=True)
        deviation += (wide - mean).square().sum().item() / n
        trunk += mean.square().sum().item()
        grams.append((wide @ wide.mT).cpu())
    gram = torch.cat(grams)
    distance = (deviation / trunk) ** 0.5 if trunk > 0 else (float("inf") if deviation > 0 else 0.0)
    if not bool(gram.isfinite().all()):
        return Geometry(float("nan"), float("nan"), float("nan"))
    gram = gram[gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0]
    if not len(gram):
        return Geometry(1.0, 1.0, distance)
    return Geometry(_similarity(gram), _rank(gram), distance)


def _similarity(gram: Tensor) -> float:
    n = gram.shape[-1]
    if n == 1:
        return 1.0
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    cosines = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    return float(cosines[:, upper].mean())


def _rank(gram: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values, those of the streams being the roots of the eigenvalues of their Gram matrix.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    eigenvalues = torch.linalg.eigvalsh(gram)
    floor = gram.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[:, -1:]  # below it there is rounding only
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1).exp().mean())
