"""The models that ship with hyper-connections, and the same models with ordinary residual adds in
their place.

A plain model is the shipping file of transformers, run as a module of its own after the few
replacements below. So it has every other line, name and parameter of the shipping one. A
replacement that does not fit the installed file any more is an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import linecache
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = 2
STREAMS = 4
VOCABULARY = 61

_EXPANSION = "hidden_states = inputs_embeds.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()"
_READ_OUT = "self.norm(self.hc_head(hidden_states))"
_COMMON = [
    (_EXPANSION, "hidden_states = inputs_embeds"),
    (_READ_OUT, "self.norm(hidden_states)"),
]


def _made(prefix: str) -> list[tuple[str, str]]:
    return [
        (f"self.attn_hc = {prefix}HyperConnection(config)", ""),
        (f"self.ffn_hc = {prefix}HyperConnection(config)", ""),
    ]


_MIXED = """post.to(dtype).unsqueeze(-1) * {}.unsqueeze(-2) + torch.matmul(
            comb.to(dtype).transpose(-1, -2), {}
        )"""
_ADDED = "(post.float().unsqueeze(-1) * hidden_states.float().unsqueeze(-2) + residual.float()).to(dtype)"
_INJECTED = """injection = hidden_states.unsqueeze(-2) * injection_weights.unsqueeze(-1)
        hidden_states = hyper_input + injection.flatten(-2)"""


@dataclass(frozen=True)
class Shipping:
    """One model of transformers: its file, its classes, a tiny config, what makes it plain, and
    what makes it the shipping one again.
    """

    name: str
    folder: str
    config: str
    model: str
    settings: dict[str, Any]
    replaced: list[tuple[str, str, int]]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"transformers.models.{self.folder}"


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_implementation": "eager",
    "experts_implementation": "batched_mm",  # the loop over experts asks which of them were hit, and so breaks the graph
}

_DEEPSEEK = Shipping(
    "deepseek-v4",
    "deepseek_v4",
    "DeepseekV4Config",
    "DeepseekV4ForCausalLM",
    {
        **_TEXT,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "q_lora_rank": 8,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe"],
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "hc_mult": STREAMS,
    },
    [
        *((old, new, 1) for old, new in _COMMON + _made("DeepseekV4")),
        ("self.hc_head = DeepseekV4HyperHead(config)", "", 1),
        ("post, comb, collapsed = self.attn_hc(hidden_states)", "collapsed = hidden_states", 1),
        ("post, comb, collapsed = self.ffn_hc(hidden_states)", "collapsed = hidden_states", 1),
        (_MIXED.format("attn_output", "hidden_states"), "hidden_states + attn_output", 1),
        (_MIXED.format("mlp_output", "hidden_states"), "hidden_states + mlp_output", 1),
    ],
)

_GLM = Shipping(
    "glm5-next",
    "glm5_next",
    "Glm5NextTextConfig",
    "Glm5NextTextModel",
    {
        **_TEXT,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
        "index_topk": 32,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "index_kpool": 4,
        # The indexer of the other kind asks for nonzero(), and so breaks the graph.
        "layer_types": ["linear_attention"] * LAYERS,
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "hc_mult": STREAMS,
    },
    [
        *((old, new, 1) for old, new in _COMMON + _made("Glm5NextText")),
        ("self.hc_head = Glm5NextTextHyperHead()", "", 1),
        ("post, comb, hidden_states = self.attn_hc(hidden_states)", "", 1),
        ("post, comb, hidden_states = self.ffn_hc(hidden_states)", "", 1),
        (_MIXED.format("hidden_states", "residual"), "residual + hidden_states", 2),
    ],
)

_HY = Shipping(
    "hy-v4",
    "hy_v4",
    "HYV4Config",
    "HYV4ForCausalLM",
    {
        **_TEXT,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "index_topk": 32,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "hc_mult": STREAMS,
    },
    [
        *((old, new, 1) for old, new in _COMMON + _made("HYV4")),
        ("self.hc_head = HYV4HyperHead(config)", "", 1),
        ("post, hidden_states = self.attn_hc(hidden_states)", "", 1),
        ("post, hidden_states = self.ffn_hc(hidden_states)", "", 1),
        (_ADDED, "residual + hidden_states", 2),
    ],
)

_QWEN = Shipping(
    "qwen4-exp",
    "qwen4_exp",
    "Qwen4ExpTextConfig",
    "Qwen4ExpForCausalLM",
    {
        **_TEXT,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        # The indexer of the other kind asks for nonzero(), and so breaks the graph.
        "layer_types": ["linear_attention"] * LAYERS,
        "hc_count": STREAMS,
        "hc_lowrank": 6,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    [
        ("hidden_states = hidden_states.repeat(1, 1, self.config.hc_count)", "", 1),
        ("hidden_states = self.hyper_connection_mixer(hidden_states)", "", 1),
        ("self.hyper_connection_mixer = Qwen4ExpTextGatedResidual(config, use_combine=False)", "", 1),
        ("self.attn_hyper_connection = Qwen4ExpTextGatedResidual(config)", "", 1),
        ("self.mlp_hyper_connection = Qwen4ExpTextGatedResidual(config)", "", 1),
        (
            "hidden_states, hyper_input, injection_weights = self.attn_hyper_connection(hidden_states)",
            "hyper_input = hidden_states",
            1,
        ),
        (
            "hidden_states, hyper_input, injection_weights = self.mlp_hyper_connection(hidden_states)",
            "hyper_input = hidden_states",
            1,
        ),
        (_INJECTED, "hidden_states = hyper_input + hidden_states", 2),
    ],
    {"init": "random", "rank": 6},  # its blocks and its end have no norms of their own
)

SHIPPING = {shipping.name: shipping for shipping in (_DEEPSEEK, _GLM, _HY, _QWEN)}


def _shipped(shipping: Shipping) -> types.ModuleType:
    return importlib.import_module(f"{shipping.path}.modeling_{shipping.folder}")


@functools.cache
def _module(shipping_name: str, plain: bool, wide: bool) -> types.ModuleType:
    """The shipping file with its replacements, as a module beside it.

    `wide`: with float64 where it goes to float32.
    """
    shipping = SHIPPING[shipping_name]
    native = importlib.import_module(f"{shipping.path}.modeling_{shipping.folder}")
    if not plain and not wide:
        return native
    assert native.__file__ is not None
    with open(native.__file__) as file:
        source = file.read()
    for old, new, count in shipping.replaced if plain else ():
        assert source.count(old) == count, (shipping_name, old, source.count(old))
        source = source.replace(old, new)
    if wide:
        for old, new in (
            (".float()", ".double()"),
            ("torch.float32", "torch.float64"),
            ("dtype=torch.float,", "dtype=torch.double,"),
        ):
            source = source.replace(old, new)
    suffix = f"{'_plain' * plain}{'_wide' * wide}"
    name = native.__name__ + suffix
    module = types.ModuleType(name)
    module.__package__ = native.__package__
    module.__file__ = native.__file__
    shown = native.__file__.replace(".py", f"{suffix}.py")  # transformers reads the name of the model from the path
    linecache.cache[shown] = (len(source), None, source.splitlines(keepends=True), shown)
    sys.modules[name] = module
    exec(compile(source, shown, "exec", dont_inherit=True), module.__dict__)
    return module


def _build(name: str, *, plain: bool, wide: bool) -> nn.Module:
    shipping = SHIPPING[name]
    config = getattr(importlib.import_module(shipping.path), shipping.config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if wide else before)
    try:
        model = getattr(_module(name, plain, wide), shipping.model)(config(**shipping.settings)).train()
        scatter(model)
    finally:
        torch.set_default_dtype(before)
    return model


def native_model(name: str, *, wide: bool = False) -> nn.Module:
    """The shipping model, tiny, with random parameters far from every start; `wide` in float64
    throughout.
    """
    return _build(name, plain=False, wide=wide)


def plain_model(name: str, *, wide: bool = False) -> nn.Module:
    """The same model with ordinary residual adds, with random parameters of its own."""
    return _build(name, plain=True, wide=wide)


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Random values for everything that starts as zero or one, so that nothing is right by
    accident.
    """
    for name, parameter in model.named_parameters():
        if "hc" in name or parameter.dim() < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.randint_like(buffer, 4))


def inputs(batch: int = 2, length: int = 6) -> Tensor:
    return (torch.arange(batch * length).reshape(batch, length) * 7 + 1) % VOCABULARY


def output(model_output: Any) -> Tensor:
    return model_output.logits if hasattr(model_output, "logits") else model_output.last_hidden_state
