"""Random residual logits: what a mapping makes of them shows what it guarantees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhc_compile.attachment.model_tree import connections

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fill_residual_logits"]


@torch.no_grad()
def fill_residual_logits(model: nn.Module, std: float, generator: torch.Generator | None = None) -> int:
    """Fills the static residual logits of every hyper-connection with N(0, std) noise, in place.

    Everything else stays: with phi = 0, as at the start, each site's H_res is then the same for all tokens.

    Args:
        model: with hyper-connections.
        std: standard deviation of the logits.
        generator: of the noise, on the CPU; torch's own if None.

    Returns:
        How many logits there are: 0 where the mapping is the identity, which has none.
    """
    count = 0
    for connection in connections(model).values():
        if "bias" in connection.names:
            logits = connection.bias[2 * connection.streams :]
            logits.copy_(torch.randn(logits.shape, generator=generator) * std)
            count += logits.numel()
    return count
