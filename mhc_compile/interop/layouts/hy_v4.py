"""HY-V4: H_res = I, so `fn` is [2n, n C] and `scale` [2]; `hc_head` is the read-out."""

from mhc_compile.interop.layout import Entry, Layout, Part, Spelling
from mhc_compile.interop.layouts.deepseek_v4 import READ_OUT, TRANSFORMERS

HY_V4 = Layout(
    preset="hy-v4",
    source="transformers.models.hy_v4 (HYV4HyperConnection, HYV4HyperHead)",
    site=(
        Entry("phi", "nC 2n", (Part("fn", "2n nC"),), "projection"),
        Entry("bias", "2n", (Part("base", "2n"),), "logits"),
        Entry("scale", "3", (Part("scale", "2"),), "scales"),
    ),
    read_out=READ_OUT,
    spellings=(
        TRANSFORMERS,
        Spelling(
            name="saved",
            sites={"hc_pre.hc_attn_layer.hc_{}": ("self_attn",), "hc_pre.hc_mlp_layer.hc_{}": ("mlp",)},
            read_out="hc_pre.hc_head.hc_head_{}",
        ),
    ),
)
