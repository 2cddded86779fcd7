"""The gain of the residual path: how much a chain of H_res can amplify a signal or a gradient over depth.

Source: arXiv 2512.24880 v2, section 5.3. For the product P = H_L ··· H_1 over the sites of a chain, the forward gain is the largest absolute row
sum of P, the backward gain the largest absolute column sum. A doubly stochastic P has both at 1; Sinkhorn after finitely many iterations has the
first at 1 and the second near it; unconstrained hyper-connections reach thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.inspection.stream_stats.measure import stability

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from mhc_compile.config.options import Options

__all__ = ["Gain", "gain"]


@dataclass(frozen=True)
class Gain:
    """Gains of the composite H_res, averaged over tokens.

    Attributes:
        forward: after each site of the chain, the largest absolute row sum of the product so far.
        backward: the largest absolute column sum.
        streams_distance: root mean square of the streams' deviation from their mean, relative to the mean's, at each site's entry: 0 while the
            streams are still copies of each other.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    streams_distance: tuple[float, ...]

    @property
    def amax_forward(self) -> float:
        """Largest forward gain over depth."""
        return max(self.forward, default=1.0)

    @property
    def amax_backward(self) -> float:
        """Largest backward gain over depth."""
        return max(self.backward, default=1.0)


def gain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any
) -> tuple[Gain, ...]:
    """The composite gains alone of what `mhc_compile.stability` measures, which says more.

    Args:
        model: see `stability`.
        *args: see `stability`.
        options: see `stability`.
        **kwargs: see `stability`.

    Returns:
        One `Gain` per chain, in the order in which they begin.

    Raises:
        AttachError: the model has no hyper-connections.
    """
    return tuple(
        Gain(
            tuple(site.composite_forward for site in chain.sites),
            tuple(site.composite_backward for site in chain.sites),
            tuple(site.entering.distance for site in chain.sites),
        )
        for chain in stability(model, *args, options=options, **kwargs).chains
    )
