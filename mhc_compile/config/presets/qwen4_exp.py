"""Qwen4-Exp: streams are not mixed (H_res = I), and a branch reads every channel with a weight of its own.

    x̂    = rmsnorm(X) per stream, times a learned weight
    gate = σ(silu(x̂ W_down / n) W_up)          [n, C], through a low rank
    h    = mean_j gate_j ∘ x̂_j                  the branch's input, which is normalised already
    post = 2 σ(x̂ W_inject / n)

There is no choice of parameters with which this is the plain residual add, so a model must be
started from scratch.
"""

from __future__ import annotations

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets.base import Preset

__all__ = ["QWEN4_EXP"]

QWEN4_EXP = Preset(
    name="qwen4-exp",
    source="transformers.models.qwen4_exp (Qwen4ExpTextGatedResidual)",
    convention=Convention(mapping="identity", rank=320),
    read_out="learned",
    preserves=False,
)
