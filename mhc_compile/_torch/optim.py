"""Optimizers that keep more than torch documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["lbfgs_has_memory", "restart_lbfgs"]


def lbfgs_has_memory(optimizer: torch.optim.LBFGS) -> bool:
    """Whether it holds flat vectors (directions, gradients) as long as all its parameters together."""
    return any(state.get("n_iter") for state in optimizer.state.values())


def restart_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    """Makes it forget its vectors and their length, because it is about to have other parameters. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None
