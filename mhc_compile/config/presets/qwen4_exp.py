"""Qwen4-Exp: streams are not mixed (H_res = I); a branch reads with one weight per channel.

    x̂    = rmsnorm(X) per stream, times a learned weight
    gate = σ(silu(x̂ W_down / n) W_up)          [n, C], through a low rank
    h    = mean_j gate_j ∘ x̂_j                  the branch's input, which is normalised already
    post = 2 σ(x̂ W_inject / n)

No parameters make this the plain residual add, so a model must be trained from scratch.
"""

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets.base import Preset

QWEN4_EXP = Preset(
    name="qwen4-exp",
    source="transformers.models.qwen4_exp (Qwen4ExpTextGatedResidual)",
    convention=Convention(mapping="identity", rank=320),
    read_out="learned",
    preserves=False,
)
