"""DeepSeek-V4: the paper's equations, an epsilon in Sinkhorn and in pre, a learned read-out.

The module computes `comb` with a row softmax and columns last, and applies it transposed, `combᵀ
X`: H_res = combᵀ has its rows normalised last, as the paper's. What is left of the transpose is the
order of the 16 residual columns in a checkpoint (`mhc_compile.interop`).
"""

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets.base import Preset

DEEPSEEK_V4 = Preset(
    name="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    convention=Convention(pre_eps=1e-6, sinkhorn_eps=1e-6),
    read_out="learned",
)
