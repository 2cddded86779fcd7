"""DeepSeek-V4: `fn` [n(n+2), n C] is phi transposed, `base` the bias, `hc_head` the read-out.

Branches have other names (`attn`, `ffn`) in published files and in the output of `save_pretrained`.
In published files every block of `mtp` is a chain of its own.
"""

from mhc_compile.interop.layout import Entry, Layout, Part, Spelling

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
TRANSFORMERS = Spelling(
    name="transformers",
    sites={"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)},
    read_out="hc_head.hc_{}",
)
_SITES = {"hc_attn_{}": ("attn",), "hc_ffn_{}": ("ffn",)}

DEEPSEEK_V4 = Layout(
    preset="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    site=SITE,
    read_out=READ_OUT,
    spellings=(
        TRANSFORMERS,
        Spelling(name="saved", sites=_SITES, read_out=TRANSFORMERS.read_out),
        Spelling(name="published", sites=_SITES, read_out="hc_head_{}", alone=("mtp",)),
    ),
    transposed=True,
)
