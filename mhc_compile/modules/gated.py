"""`GatedConnection`: the parameters of a site that reads with one weight per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.config.options import ResolvedOptions


class GatedConnection(HyperConnection):
    """A hyper-connection whose read has a weight for every channel.

    `X' = X + H_postᵀ f(h)`, `h = mean_j gate_j ∘ rmsnorm(X_j)`. Source:
    `transformers.models.qwen4_exp.Qwen4ExpTextGatedResidual`; equations in
    `mhc_compile.ops.gated_reference.gated_read`. Shapes, with rank r:

        phi  [n C, r + n]   projections of the normalised streams: to the gate's rank, and to post
        norm [n C]          weight of the norm, less one
        up   [r, n C]       from the rank to the gates

    There is no function-preserving init: the branch reads a normalised value.
    """

    names: tuple[str, str, str] = ("phi", "norm", "up")

    norm: nn.Parameter
    up: nn.Parameter

    def _create(self, **empty: Any) -> None:
        features = self.streams * self.width
        self.phi = nn.Parameter(torch.empty(features, self.rank + self.streams, **empty))
        self.norm = nn.Parameter(torch.empty(features, **empty))
        self.up = nn.Parameter(torch.empty(self.rank, features, **empty))

    def start(self) -> dict[str, Tensor]:
        """Return the start: projections of unit variance, and a norm without weights."""
        phi, norm, up = (torch.zeros(getattr(self, name).shape, dtype=self.phi.dtype) for name in self.names)
        phi.normal_(std=(self.streams * self.width) ** -0.5)
        up.normal_(std=self.rank**-0.5)
        return {"phi": phi, "norm": norm, "up": up}

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(h [..., C], post [..., n], res [..., n, n])`: the branch input, not `pre`.

        Raises:
            ShapeError: the streams do not fit n and C.
        """
        return torch.ops.mhc.gated_read(streams, self.phi, self.norm, self.up, self.eps)  # type: ignore[no-any-return]

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return new streams [..., n, C]; `branch` is a function of [..., C]."""
        h, post, res = self.coefficients(streams)
        return torch.ops.mhc.update(streams, branch(h), post, res)  # type: ignore[no-any-return]


def create_connection(width: int, options: ResolvedOptions, **settings: Any) -> HyperConnection:
    """Return the kind of `HyperConnection` that the options need, with these settings."""
    kind = GatedConnection if options.rank else HyperConnection
    return kind(width, options, **settings)
