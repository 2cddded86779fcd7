"""Decoder language models of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SPECIAL, architecture, ids, sizes
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_ONE, _TWO, _THREE = (chains(lambda n, k=k: (k * n,)) for k in (1, 2, 3))  # type: ignore[misc]


def _gpt(layers: int, **more: Any) -> dict[str, Any]:
    """The names that GPT-2 and its kin use."""
    return {**SPECIAL, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, **more}


def _glu(layers: int, **more: Any) -> dict[str, Any]:
    """Llama and its kin."""
    return sizes(layers, num_key_value_heads=2, head_dim=8, **more)


def _call() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def _padded() -> dict[str, Any]:
    import torch

    given = ids()
    return {
        "input_ids": given,
        "attention_mask": torch.ones_like(given).index_fill_(1, torch.tensor([5]), 0),
        "use_cache": False,
    }


def _cached() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": True}


def _everything() -> dict[str, Any]:
    given = ids()
    return {
        "input_ids": given,
        "token_type_ids": given % 3,
        "labels": given,
        "output_hidden_states": True,
        "use_cache": False,
    }


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _half(model: Any) -> Any:
    import torch

    return model.to(torch.bfloat16)


def _family(
    name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any = _TWO, **more: Any
) -> Family:
    model = more.pop("model", f"{kind.removesuffix('Text')}ForCausalLM")
    return architecture(name, "language", kind, model, settings, more.pop("inputs", _call), expected, **more)


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]


def _in_pieces(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected((2 * layers,), note="position encodings by numpy: three graphs, all adds in one of them")


FAMILIES: tuple[Family, ...] = (
    _family("gpt2", "GPT2", _gpt, model="GPT2LMHeadModel"),
    _family("gpt2-everything", "GPT2", _gpt, model="GPT2LMHeadModel", inputs=_everything),
    _family("openai-gpt", "OpenAIGPT", _gpt, model="OpenAIGPTLMHeadModel", inputs=lambda: {"input_ids": ids()}),
    _family("gpt-bigcode", "GPTBigCode", _gpt),
    _family("gptj", "GPTJ", lambda n: _gpt(n, rotary_dim=4, tie_word_embeddings=False), _ONE),
    _family("codegen", "CodeGen", lambda n: _gpt(n, n_head=4, rotary_dim=4, n_ctx=64), _ONE),
    _family("gpt-neo", "GPTNeo", lambda n: {**SPECIAL, "hidden_size": 16, "num_layers": n, "num_heads": 2, "attention_types": [[["global"], n]],
                                            "intermediate_size": 24, "max_position_embeddings": 64, "window_size": 8}),
    _family("gpt-neox", "GPTNeoX", lambda n: sizes(n, use_parallel_residual=True), _ONE),
    _family("gpt-neox-sequential", "GPTNeoX", lambda n: sizes(n, use_parallel_residual=False)),
    _family("llama", "Llama", _glu),
    _family("llama-padded", "Llama", lambda n: _glu(n, attn_implementation="eager"), inputs=_padded),
    _family("llama-cache", "Llama", _glu, inputs=_cached),
    _family("llama-bfloat16", "Llama", _glu, prepare=_half, double=False, tolerance=5e-2, because="computes in bfloat16"),
    _family("llama-checkpointed", "Llama", _glu, prepare=_checkpointed),
    _family("mistral", "Mistral", lambda n: _glu(n, sliding_window=8)),
    _family("qwen2", "Qwen2", lambda n: sizes(n, num_key_value_heads=2)),
    _family("gemma3", "Gemma3Text", lambda n: _glu(n, sliding_window=8, query_pre_attn_scalar=8), model="Gemma3ForCausalLM"),
    _family("gemma4", "Gemma4Text", lambda n: _glu(n, global_head_dim=8, sliding_window=8, vocab_size_per_layer_input=40,
                                                   hidden_size_per_layer_input=8, layer_types=_alternating(n), num_kv_shared_layers=0), _THREE,
            model="Gemma4ForCausalLM"),
    _family("phi", "Phi", sizes, _ONE),
    _family("phi3", "Phi3", lambda n: sizes(n, num_key_value_heads=2)),
    _family("falcon", "Falcon", lambda n: {**sizes(n), "new_decoder_architecture": True, "num_kv_heads": 2}, _ONE),
    _family("opt", "OPT", lambda n: sizes(n, ffn_dim=24, word_embed_proj_dim=16)),
    _family("opt-post", "OPT", lambda n: sizes(n, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False)),
    _family("bloom", "Bloom", lambda n: {**SPECIAL, "hidden_size": 16, "n_layer": n, "n_head": 2}),
    _family("bloom-normed-skip", "Bloom", lambda n: {**SPECIAL, "hidden_size": 16, "n_layer": n, "n_head": 2,
                                                     "apply_residual_connection_post_layernorm": True}),
    _family("mpt", "Mpt", lambda n: {**SPECIAL, "d_model": 16, "n_heads": 2, "n_layers": n, "max_seq_len": 64}),
    _family("olmo", "Olmo", lambda n: sizes(n, num_key_value_heads=2)),
    _family("olmo2", "Olmo2", lambda n: sizes(n, num_key_value_heads=2)),
    _family("granite", "Granite", lambda n: sizes(n, num_key_value_heads=2, residual_multiplier=0.22, attention_multiplier=0.25)),
    _family("stablelm-parallel", "StableLm", lambda n: sizes(n, num_key_value_heads=2, use_parallel_residual=True), _ONE),
    _family("nemotron", "Nemotron", lambda n: _glu(n)),
    _family("nanochat", "NanoChat", lambda n: _glu(n)),
    _family("smollm3", "SmolLM3", lambda n: _glu(n)),
    _family("cohere", "Cohere", lambda n: sizes(n, num_key_value_heads=2), _ONE),
    _family("glm4", "Glm4", lambda n: _glu(n)),
    _family("ctrl", "CTRL", lambda n: _gpt(n, dff=24), _in_pieces, model="CTRLLMHeadModel"),
)  # fmt: skip
