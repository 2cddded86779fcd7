"""Qwen4-Exp: a norm, a low-rank gate and the weights of post.

Our phi is the concatenation of the two projections of the normalized streams. Blocks have no norms
of their own. The n-gram layers (`ple`), which write to all streams, are no sites.
"""

from mhc_compile.interop.layout import Entry, Layout, Part, Spelling

_NORM = Entry("norm", "nC", (Part("hc_norm.weight", "nC"),), "same")
_DOWN = Part("input_mix_weight_down.weight", "r nC")
_UP = Entry("up", "r nC", (Part("input_mix_weight_up.weight", "nC r"),), "projection")

QWEN4_EXP = Layout(
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
