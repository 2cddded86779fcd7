"""Norms of a branch's input as the fused operators take them, and torch's functions for them."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def norms(width, dtype=torch.float64):
    """The arguments that ask for no norm, and for one of every kind, with and without weights.

    The gradient of a norm of one number is zero but for rounding: nothing to compare.
    """
    if width == 1:
        return [()] * 4
    gain, shift = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype)
    return [(), ("rms", gain, None, 0.1), ("layer", gain, shift, 1e-2), ("rms", None, None, 1e-5)]


def by_torch(h, norm="", gain=None, shift=None, eps=0.0):
    """The norm of h."""
    if norm == "rms":
        return F.rms_norm(h, h.shape[-1:], gain, eps)
    return F.layer_norm(h, h.shape[-1:], gain, shift, eps) if norm else h


def of_backward(norm, moments):
    """What a backward takes after its settings."""
    return (*norm[:3], moments) if norm else ()


def weights_of(norm):
    """Gain and shift, where there are any."""
    return [one for one in norm[1:3] if one is not None]
