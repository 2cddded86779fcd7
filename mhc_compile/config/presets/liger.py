"""Liger-Kernel's `LigerMHC`: DeepSeek-V4's Sinkhorn without the transpose: columns are exact."""

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets.base import Preset

LIGER = Preset(
    name="liger",
    source="liger_kernel.transformers.mhc (LigerMHC), version 0.8.5",
    convention=Convention(sinkhorn_eps=1e-6, last="columns"),
)
