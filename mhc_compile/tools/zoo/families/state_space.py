"""State-space models, recurrences and hybrids of transformers. Their scans are full of additions that are no residual adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SPECIAL, architecture, ids, sizes
from mhc_compile.tools.zoo.family import chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_ONE, _TWO = chains(lambda n: (n,)), chains(lambda n: (2 * n,))
_MAMBA: dict[str, Any] = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}


def _mamba(layers: int, **more: Any) -> dict[str, Any]:
    return {**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": layers, "conv_kernel": 4, **more}


def _jamba(layers: int) -> dict[str, Any]:
    """Attention and experts in every second layer."""
    return sizes(
        layers, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4, use_mamba_kernels=False, **_MAMBA,
    )  # fmt: skip


def _zamba(layers: int) -> dict[str, Any]:
    """A shared attention layer in front of every mixer but the first, whose result is added for the mixer alone."""
    return sizes(
        layers + 1, num_key_value_heads=2, n_mamba_heads=2, mamba_dt_rank=4, use_mamba_kernels=False,
        layers_block_type=["linear_attention"] + ["hybrid"] * layers, **_MAMBA,
    )  # fmt: skip


def _zamba2(layers: int) -> dict[str, Any]:
    return sizes(
        layers, num_key_value_heads=2, n_mamba_heads=4, mamba_headdim=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1,
        layers_block_type=["mamba" if layer % 2 == 0 else "hybrid" for layer in range(layers)], **_MAMBA,
    )  # fmt: skip


def _qwen3_next(layers: int) -> dict[str, Any]:
    return sizes(
        layers, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        layer_types=["linear_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)],
    )  # fmt: skip


def _half(model: Any) -> Any:
    import torch

    return model.to(torch.bfloat16)


def _family(name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any, **more: Any) -> Family:
    def inputs() -> dict[str, Any]:
        return {"input_ids": ids(4), "use_cache": False}

    return architecture(name, "state_space", kind, f"{kind}ForCausalLM", settings, inputs, expected, **more)


FAMILIES: tuple[Family, ...] = (
    _family("mamba", "Mamba", _mamba, _ONE),
    _family("mamba-bfloat16", "Mamba", lambda n: _mamba(n, residual_in_fp32=True), _ONE, prepare=_half, double=False, tolerance=5e-2,
            because="computes in bfloat16, on a float32 trunk"),
    _family("mamba2", "Mamba2", lambda n: _mamba(n, num_heads=4, head_dim=8, n_groups=2, chunk_size=8), _ONE),
    _family("falcon-mamba", "FalconMamba", _mamba, _ONE),
    _family("rwkv", "Rwkv", lambda n: {**SPECIAL, "hidden_size": 16, "num_hidden_layers": n, "context_length": 64}, _TWO),
    _family("jamba", "Jamba", _jamba, _TWO, double=False, because=""),
    _family("zamba", "Zamba", _zamba, chains(lambda n: (n + 1,))),
    _family("zamba2", "Zamba2", _zamba2, _ONE),
    _family("xlstm", "xLSTM", lambda n: {**SPECIAL, "hidden_size": 16, "num_blocks": n, "num_heads": 2}, _TWO),
    _family("qwen3-next", "Qwen3Next", _qwen3_next, _TWO, double=False, because=""),
    _family("recurrent-gemma", "RecurrentGemma", lambda n: sizes(n, num_key_value_heads=1, lru_width=16, attention_window_size=8), _TWO),
)  # fmt: skip
