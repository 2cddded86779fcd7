"""Hyper-connections away from their start, and what a gate_speed does, for oracles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import mhc_compile

if TYPE_CHECKING:
    from torch import Tensor, nn


def faster(parameter: Tensor, speed: float) -> Tensor:
    """Return `speed * parameter`, whose gradient is that of a parameter without the factor."""
    return (speed * parameter).detach() + (parameter - parameter.detach())


@torch.no_grad()
def scatter(model: nn.Module, std: float, *, add: bool = False, generator: torch.Generator | None = None) -> None:
    """Make hyper-connections N(0, std) in the paper's units, or add that to what they are: streams
    then differ, coefficients depend on the token, and no gate is saturated.
    """
    for connection in mhc_compile.connections(model).values():
        for name, parameter in connection.named_parameters():
            size = std / connection.speeds.get(name, 1)
            noise = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(parameter + noise if add else noise)
