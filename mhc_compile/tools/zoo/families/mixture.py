"""Mixtures of experts of transformers: sums of experts inside the branch, losses of the router beside the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import architecture, ids, sizes
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_TWO = chains(lambda n: (2 * n,))


def _experts(layers: int, **more: Any) -> dict[str, Any]:
    """Four experts, two per token."""
    return sizes(layers, num_key_value_heads=2, num_experts_per_tok=2, **more)


def _qwen(layers: int, **more: Any) -> dict[str, Any]:
    return _experts(layers, num_experts=4, moe_intermediate_size=8, **more)


def _deepseek(layers: int) -> dict[str, Any]:
    """A dense layer, then experts with a shared one; latent attention."""
    return _experts(
        layers, moe_intermediate_size=8, n_shared_experts=1, n_routed_experts=4, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=2, topk_group=1,
    )  # fmt: skip


def _with_loss() -> dict[str, Any]:
    given = ids()
    return {"input_ids": given, "labels": given, "use_cache": False}


def _streams(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(note="has hyper-connections of its own: nothing to replace")


def _family(
    name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any = _TWO, **more: Any
) -> Family:
    inputs = more.pop("inputs", lambda: {"input_ids": ids(), "use_cache": False})
    return architecture(
        name, "mixture", kind, f"{kind}ForCausalLM", settings, inputs, expected, double=False, because="", **more
    )


FAMILIES: tuple[Family, ...] = (
    _family("mixtral", "Mixtral", lambda n: _experts(n, num_local_experts=4)),
    _family("granitemoe", "GraniteMoe", lambda n: _experts(n, num_local_experts=4, residual_multiplier=0.22)),
    _family("qwen2-moe", "Qwen2Moe", lambda n: _qwen(n, shared_expert_intermediate_size=8)),
    _family("qwen3-moe", "Qwen3Moe", lambda n: _qwen(n, head_dim=8, mlp_only_layers=[0])),
    _family("qwen3-moe-loss", "Qwen3Moe", lambda n: _qwen(n, head_dim=8, output_router_logits=True), inputs=_with_loss),
    _family("olmoe", "Olmoe", lambda n: _experts(n, num_experts=4)),
    _family("deepseek-v2", "DeepseekV2", _deepseek),
    _family("deepseek-v3", "DeepseekV3", _deepseek),
    _family("deepseek-v4", "DeepseekV4", lambda n: sizes(n, num_key_value_heads=1, moe_intermediate_size=8), _streams),
    _family("gpt-oss", "GptOss", lambda n: _experts(n, head_dim=8, num_local_experts=4, sliding_window=8)),
)
