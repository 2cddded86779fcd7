"""GLM-5-next: the sites of DeepSeek-V4. The read-out is the mean, without parameters."""

from dataclasses import replace

from mhc_compile.interop.layout import Layout, Spelling
from mhc_compile.interop.layouts.deepseek_v4 import SITE, TRANSFORMERS

GLM5_NEXT = Layout(
    preset="glm5-next",
    source="transformers.models.glm5_next (Glm5NextTextHyperConnection)",
    site=SITE,
    spellings=(
        replace(TRANSFORMERS, read_out=""),
        Spelling(name="saved", sites={"hc_attn_{}": ("self_attn",), "hc_ffn_{}": ("mlp",)}),
    ),
    transposed=True,
)
