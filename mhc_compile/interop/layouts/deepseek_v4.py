"""DeepSeek-V4: `fn` [n(n+2), n C] is phi transposed, `base` the bias, and the matrix is applied transposed; `hc_head` is the read-out.

In published files, and in those that `save_pretrained` writes, branches have other names (`attn`, `ffn`). In the former every block of `mtp` is a
chain of its own.
"""

from __future__ import annotations

from mhc_compile.interop.layout import Entry, Layout, Spelling

__all__ = ["DEEPSEEK_V4", "ENTRIES"]

ENTRIES = (Entry("phi", "fn", "projection"), Entry("bias", "base", "logits"), Entry("scale", "scale", "scales"))

DEEPSEEK_V4 = Layout(
    preset="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    entries=ENTRIES,
    read_out=ENTRIES,
    spellings=(
        Spelling(
            name="transformers",
            sites={"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)},
            read_out="hc_head.hc_{}",
        ),
        Spelling(
            name="saved",
            sites={"hc_attn_{}": ("attn",), "hc_ffn_{}": ("ffn",)},
            read_out="hc_head.hc_{}",
        ),
        Spelling(
            name="published",
            sites={"hc_attn_{}": ("attn",), "hc_ffn_{}": ("ffn",)},
            read_out="hc_head_{}",
            alone=("mtp",),
        ),
    ),
    transposed=True,
)
