"""The layouts by preset, and their registry. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from mhc_compile.config.presets import get_preset
from mhc_compile.errors import OptionError
from mhc_compile.interop.layout import Entry, Layout, Part, Spelling

# `fn` [n(n+2), n C] is phi transposed, `base` the bias, `hc_head` the read-out.
_SITE = (
    Entry("phi", "nC n(n+2)", (Part("fn", "n(n+2) nC"),), "projection"),
    Entry("bias", "n(n+2)", (Part("base", "n(n+2)"),), "logits"),
    Entry("scale", "3", (Part("scale", "3"),), "scales"),
)
_READ_OUT = (
    Entry("weight", "nC n", (Part("fn", "n nC"),), "projection"),
    Entry("bias", "n", (Part("base", "n"),), "logits"),
    Entry("scale", "1", (Part("scale", "1"),), "scales"),
)
_TRANSFORMERS = Spelling(
    name="transformers",
    sites={"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)},
    read_out="hc_head.hc_{}",
)
# Branches have other names in published files and in the output of `save_pretrained`. In published
# files every block of `mtp` is a chain of its own.
_SITES = {"hc_attn_{}": ("attn",), "hc_ffn_{}": ("ffn",)}
_DEEPSEEK_V4 = Layout(
    preset="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    site=_SITE,
    read_out=_READ_OUT,
    spellings=(
        _TRANSFORMERS,
        Spelling(name="saved", sites=_SITES, read_out=_TRANSFORMERS.read_out),
        Spelling(name="published", sites=_SITES, read_out="hc_head_{}", alone=("mtp",)),
    ),
    transposed=True,
)

# The sites of DeepSeek-V4. The read-out is the mean, without parameters.
_GLM5_NEXT = Layout(
    preset="glm5-next",
    source="transformers.models.glm5_next (Glm5NextTextHyperConnection)",
    site=_SITE,
    spellings=(
        replace(_TRANSFORMERS, read_out=""),
        Spelling(name="saved", sites={"hc_attn_{}": ("self_attn",), "hc_ffn_{}": ("mlp",)}),
    ),
    transposed=True,
)

# H_res = I, so `fn` is [2n, n C] and `scale` [2].
_HY_V4 = Layout(
    preset="hy-v4",
    source="transformers.models.hy_v4 (HYV4HyperConnection, HYV4HyperHead)",
    site=(
        Entry("phi", "nC 2n", (Part("fn", "2n nC"),), "projection"),
        Entry("bias", "2n", (Part("base", "2n"),), "logits"),
        Entry("scale", "3", (Part("scale", "2"),), "scales"),
    ),
    read_out=_READ_OUT,
    spellings=(
        _TRANSFORMERS,
        Spelling(
            name="saved",
            sites={"hc_pre.hc_attn_layer.hc_{}": ("self_attn",), "hc_pre.hc_mlp_layer.hc_{}": ("mlp",)},
            read_out="hc_pre.hc_head.hc_head_{}",
        ),
    ),
)

# A norm, a low-rank gate and the weights of post. Our phi is the concatenation of the two
# projections of the normalized streams. Blocks have no norms of their own. The n-gram layers
# (`ple`), which write to all streams, are no sites.
_NORM = Entry("norm", "nC", (Part("hc_norm.weight", "nC"),), "same")
_DOWN = Part("input_mix_weight_down.weight", "r nC")
_UP = Entry("up", "r nC", (Part("input_mix_weight_up.weight", "nC r"),), "projection")
_QWEN4_EXP = Layout(
    preset="qwen4-exp",
    source="transformers.models.qwen4_exp (Qwen4ExpTextGatedResidual)",
    site=(Entry("phi", "nC r+n", (_DOWN, Part("block_inject_weight.weight", "n nC")), "projection"), _NORM, _UP),
    read_out=(Entry("weight", "nC r", (_DOWN,), "projection"), _NORM, _UP),
    spellings=(
        Spelling(
            name="transformers",
            sites={"attn_hyper_connection.{}": ("self_attn", "linear_attn"), "mlp_hyper_connection.{}": ("mlp",)},
            read_out="hyper_connection_mixer.{}",
        ),
    ),
)

#: By the name of the preset.
LAYOUTS: dict[str, Layout] = {layout.preset: layout for layout in (_DEEPSEEK_V4, _GLM5_NEXT, _HY_V4, _QWEN4_EXP)}


def get_layout(preset: str) -> Layout:
    """Return the layout of the system that `preset` stands for.

    Raises:
        OptionError: there is no such preset, or it has no layout.
    """
    get_preset(preset)
    if preset not in LAYOUTS:
        raise OptionError(
            f"preset {preset!r} has no layout of its own; known layouts: {', '.join(LAYOUTS)}. Add one with"
            " mhc_compile.interop.layouts.register_layout"
        )
    return LAYOUTS[preset]


def register_layout(layout: Layout) -> Layout:
    """Add a layout under the name of its preset, and return it.

    Raises:
        OptionError: there is no such preset (see `register_preset`), or it has another layout.
    """
    get_preset(layout.preset)
    if LAYOUTS.setdefault(layout.preset, layout) != layout:
        raise OptionError(
            f"preset {layout.preset!r} has another layout already; register a preset with a name of its own"
        )
    return layout
