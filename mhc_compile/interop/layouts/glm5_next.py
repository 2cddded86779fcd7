"""GLM-5-next: DeepSeek-V4's sites; the read-out is the mean of the streams and has no parameters."""

from __future__ import annotations

from mhc_compile.interop.layout import Layout, Spelling
from mhc_compile.interop.layouts.deepseek_v4 import SITE

__all__ = ["GLM5_NEXT"]

GLM5_NEXT = Layout(
    preset="glm5-next",
    source="transformers.models.glm5_next (Glm5NextTextHyperConnection)",
    site=SITE,
    spellings=(
        Spelling(name="transformers", sites={"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)}),
        Spelling(name="saved", sites={"hc_attn_{}": ("self_attn",), "hc_ffn_{}": ("mlp",)}),
    ),
    transposed=True,
)
