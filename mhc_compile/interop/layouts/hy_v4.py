"""HY-V4: H_res = I, so `fn` is [2n, n C] and `scale` [2]; `hc_head` is the read-out."""

from __future__ import annotations

from mhc_compile.interop.layout import Layout, Spelling
from mhc_compile.interop.layouts.deepseek_v4 import ENTRIES

__all__ = ["HY_V4"]

HY_V4 = Layout(
    preset="hy-v4",
    source="transformers.models.hy_v4 (HYV4HyperConnection, HYV4HyperHead)",
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
            sites={"hc_pre.hc_attn_layer.hc_{}": ("self_attn",), "hc_pre.hc_mlp_layer.hc_{}": ("mlp",)},
            read_out="hc_pre.hc_head.hc_head_{}",
        ),
    ),
    mixes=False,
)
