"""A chain while it runs: its products of H_res, and what is kept of each site."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mhc_compile.inspection.stream_stats.moments import amax, geometry, rows, weights
from mhc_compile.inspection.stream_stats.result import ChainStability, Geometry, SiteStability

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.inspection.stream_stats.result import Weights

__all__ = ["Chain"]


@dataclass(eq=False)
class Chain:
    """Takes the sites of a chain one after the other. Of the streams nothing is kept, of H_res [tokens, n, n], which the way back needs."""

    sites: list[SiteStability] = field(default_factory=list)
    width: int = 0
    merged: bool = False
    #: Every site's H_res, on the CPU.
    _matrices: list[Tensor] = field(default_factory=list)
    #: The composite of each token so far.
    _product: Tensor | None = None
    #: The streams that left the last site, as long as they live, and how they lie.
    _left: tuple[weakref.ref[Tensor], Geometry] | None = None

    def add(self, path: str, pre: Weights | None, post: Tensor, res: Tensor, streams: Tensor, after: Tensor) -> None:
        """One more site.

        Args:
            path: of its hyper-connection.
            pre: read weights, reduced, if there are any.
            post: [..., n].
            res: [..., n, n], as it multiplies the streams from the left.
            streams: [..., n, C], before the site.
            after: [..., n, C], behind it.
        """
        self.width = streams.shape[-1]
        n = res.shape[-1]
        kept = res.detach().reshape(-1, n, n).cpu()
        matrices = kept.double()
        # Token axes may be reshaped between sites, but their order and number stay.
        product = matrices if self._product is None else matrices @ self._fit(self._product, len(matrices))
        self._product = product
        self._matrices.append(kept)
        mean = matrices.mean(0)
        alone, composite = amax(matrices), amax(product)
        entering = self._entering(streams)
        self.sites.append(
            SiteStability(
                path=path,
                tokens=len(matrices),
                mean=rows(mean),
                spread=(matrices - mean).abs().amax().item(),
                composite=rows(product.mean(0)),
                remainder=(),
                forward=alone.forward,
                backward=alone.backward,
                composite_forward=composite.forward,
                composite_backward=composite.backward,
                remainder_forward=0.0,
                remainder_backward=0.0,
                row_error=(matrices.sum(-1) - 1).abs().amax().item(),
                column_error=(matrices.sum(-2) - 1).abs().amax().item(),
                lowest=matrices.amin().item(),
                pre=pre,
                post=weights(post),
                entering=entering,
            )
        )
        self._left = weakref.ref(after), geometry(after)

    def result(self) -> ChainStability:
        """The chain, with the products from each site to the end."""
        product: Tensor | None = None
        sites = []
        for site, kept in zip(reversed(self.sites), reversed(self._matrices), strict=True):
            matrices = kept.double()
            product = matrices if product is None else self._fit(product, len(matrices)) @ matrices
            gains = amax(product)
            sites.append(
                replace(
                    site,
                    remainder=rows(product.mean(0)),
                    remainder_forward=gains.forward,
                    remainder_backward=gains.backward,
                )
            )
        assert self._left is not None
        return ChainStability(len(sites[0].mean), self.width, tuple(sites[::-1]), self._left[1], self.merged)

    def _fit(self, product: Tensor, tokens: int) -> Tensor:
        if len(product) == tokens:
            return product
        self.merged = True
        return product.mean(0, keepdim=True).expand(tokens, -1, -1)

    def _entering(self, streams: Tensor) -> Geometry:
        """Where no trunk operation lies between two sites, what enters is what left."""
        if self._left is not None and self._left[0]() is streams:
            return self._left[1]
        with torch.no_grad():
            return geometry(streams)
