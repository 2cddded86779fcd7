"""State dicts as the shipping models have them, made of numbers alone."""

from __future__ import annotations

import torch

WIDTH = 6
RANK = 3

#: Shapes of a site and of a read-out, by preset, for n streams of width C.
SITES = {
    "deepseek-v4": {
        "fn": lambda n, c: (n * (n + 2), n * c),
        "base": lambda n, c: (n * (n + 2),),
        "scale": lambda n, c: (3,),
    },
    "hy-v4": {"fn": lambda n, c: (2 * n, n * c), "base": lambda n, c: (2 * n,), "scale": lambda n, c: (2,)},
    "qwen4-exp": {
        "hc_norm.weight": lambda n, c: (n * c,),
        "input_mix_weight_down.weight": lambda n, c: (RANK, n * c),
        "input_mix_weight_up.weight": lambda n, c: (n * c, RANK),
        "block_inject_weight.weight": lambda n, c: (n, n * c),
    },
}
SITES["glm5-next"] = SITES["deepseek-v4"]
HEAD = {"fn": lambda n, c: (n, n * c), "base": lambda n, c: (n,), "scale": lambda n, c: (1,)}
HEADS = {
    "deepseek-v4": HEAD,
    "hy-v4": HEAD,
    "glm5-next": {},
    "qwen4-exp": {name: shape for name, shape in SITES["qwen4-exp"].items() if "inject" not in name},
}
#: Templates of names: of the two sites of a block, of the read-out, and the names of the branches.
NAMES = {
    ("deepseek-v4", "transformers"): ("attn_hc.{}", "ffn_hc.{}", "model.hc_head.hc_{}", "self_attn", "mlp"),
    ("deepseek-v4", "saved"): ("hc_attn_{}", "hc_ffn_{}", "model.hc_head.hc_{}", "attn", "ffn"),
    ("deepseek-v4", "published"): ("hc_attn_{}", "hc_ffn_{}", "model.hc_head_{}", "attn", "ffn"),
    ("glm5-next", "transformers"): ("attn_hc.{}", "ffn_hc.{}", "", "self_attn", "mlp"),
    ("glm5-next", "saved"): ("hc_attn_{}", "hc_ffn_{}", "", "self_attn", "mlp"),
    ("hy-v4", "transformers"): ("attn_hc.{}", "ffn_hc.{}", "model.hc_head.hc_{}", "self_attn", "mlp"),
    ("hy-v4", "saved"): (
        "hc_pre.hc_attn_layer.hc_{}",
        "hc_pre.hc_mlp_layer.hc_{}",
        "model.hc_pre.hc_head.hc_head_{}",
        "self_attn",
        "mlp",
    ),
    ("qwen4-exp", "transformers"): (
        "attn_hyper_connection.{}",
        "mlp_hyper_connection.{}",
        "model.hyper_connection_mixer.{}",
        "linear_attn",
        "mlp",
    ),
}


def native_state(
    preset: str, spelling: str = "transformers", *, layers: int = 12, n: int = 4
) -> dict[str, torch.Tensor]:
    """A model of `layers` blocks; more than ten, so that blocks are not to be sorted as words."""
    first, second, head, *branches = NAMES[preset, spelling]
    state = {"model.embed.weight": torch.randn(5, WIDTH)}
    for layer in range(layers):
        owner = f"model.layers.{layer}"
        for template, branch in zip((first, second), branches, strict=True):
            state[f"{owner}.{branch}.weight"] = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
            for name, shape in SITES[preset].items():
                state[f"{owner}.{template.format(name)}"] = torch.randn(shape(n, WIDTH))
    for name, shape in HEADS[preset].items():
        state[head.format(name)] = torch.randn(shape(n, WIDTH))
    state["lm_head.weight"] = torch.randn(5, WIDTH)
    return state


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(
        got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]) for name in wanted
    )
