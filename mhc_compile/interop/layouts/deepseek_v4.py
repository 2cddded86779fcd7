"""DeepSeek-V4: `fn` [n(n+2), n C] is phi transposed, `base` the bias, and the matrix is applied transposed; `hc_head` is the read-out.

In published files, and in those that `save_pretrained` writes, branches have other names (`attn`, `ffn`). In the former every block of `mtp` is a
chain of its own.
"""

from __future__ import annotations

from mhc_compile.interop.layout import Entry, Layout, Part, Spelling

__all__ = ["DEEPSEEK_V4", "READ_OUT", "SITE"]

SITE = (
    Entry("phi", "nC n(n+2)", (Part("fn", "n(n+2) nC"),), "projection"),
    Entry("bias", "n(n+2)", (Part("base", "n(n+2)"),), "logits"),
    Entry("scale", "3", (Part("scale", "3"),), "scales"),
)
READ_OUT = (
    Entry("weight", "nC n", (Part("fn", "n nC"),), "projection"),
    Entry("bias", "n", (Part("base", "n"),), "logits"),
    Entry("scale", "1", (Part("scale", "1"),), "scales"),
)

DEEPSEEK_V4 = Layout(
    preset="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    site=SITE,
    read_out=READ_OUT,
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
