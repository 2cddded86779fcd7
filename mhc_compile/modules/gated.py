"""`GatedConnection`: the parameters of a site that reads every channel with a weight of its own, and who makes which kind of connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.config.options import ResolvedOptions

__all__ = ["GatedConnection", "create_connection"]


class GatedConnection(HyperConnection):
    """A hyper-connection whose read has a weight for every channel: `X' = X + H_postᵀ f(h)`, `h = mean_j gate_j ∘ rmsnorm(X_j)`.

    Source: `transformers.models.qwen4_exp.Qwen4ExpTextGatedResidual`; equations in `mhc_compile.ops.gated_reference.gated_read`. Shapes, with rank r:

        phi  [n C, r + n]   projections of the normalised streams: to the gate's rank, and to post
        norm [n C]          weight of the norm, less one
        up   [r, n C]       from the rank to the gates

    There is no function-preserving start: the branch reads a normalised value.
    """

    names: tuple[str, str, str] = ("phi", "norm", "up")

    norm: nn.Parameter
    up: nn.Parameter

    def _create(self, **empty: Any) -> None:
        features = self.streams * self.width
        self.phi = nn.Parameter(torch.empty(features, self.rank + self.streams, **empty))
        self.norm = nn.Parameter(torch.empty(features, **empty))
        self.up = nn.Parameter(torch.empty(self.rank, features, **empty))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Writes the start: projections of unit variance, and a norm that does nothing more."""
        nn.init.normal_(self.phi, std=(self.streams * self.width) ** -0.5)
        nn.init.normal_(self.up, std=self.rank**-0.5)
        self.norm.zero_()

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(h [..., C], post [..., n], res [..., n, n])`: what the branch reads stands in the place of `pre`.

        Raises:
            ShapeError: the streams do not fit n and C.
        """
        return torch.ops.mhc.gated_read(streams, self.phi, self.norm, self.up, self.eps)  # type: ignore[no-any-return]

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """One site by hand: streams [..., n, C] and `branch`, a function of [..., C], to new streams [..., n, C]."""
        h, post, res = self.coefficients(streams)
        return torch.ops.mhc.update(streams, branch(h), post, res)  # type: ignore[no-any-return]


def create_connection(width: int, options: ResolvedOptions, **settings: Any) -> HyperConnection:
    """The hyper-connection of the kind that the options ask for. `settings` are those of `HyperConnection`."""
    kind = GatedConnection if options.rank else HyperConnection
    return kind(width, options, **settings)
