"""What a gate_speed does to bias, for oracles that autograd differentiates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def faster(parameter: Tensor, speed: float) -> Tensor:
    """Return `speed * parameter`, whose gradient is that of a parameter without the factor."""
    return (speed * parameter).detach() + (parameter - parameter.detach())
