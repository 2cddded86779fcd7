"""Text models of transformers: decoders, mixtures of experts, state spaces, encoders, both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mhc_compile.tools.zoo.families.architectures import SPECIAL, architecture, attended, call, ids, sides, sizes
from mhc_compile.tools.zoo.family import Family, chains, per_layer

_ONE, _PAIR = per_layer(1), per_layer(2, 3)


def _every_second(layers: int, first: str, second: str) -> list[str]:
    return [second if layer % 2 else first for layer in range(layers)]


# Decoders
def _gpt(layers: int, **more: Any) -> dict[str, Any]:
    """Return settings under the names of GPT-2 and its kin."""
    return {**SPECIAL, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, **more}


def _bloom(layers: int, **more: Any) -> dict[str, Any]:
    return {**SPECIAL, "hidden_size": 16, "n_layer": layers, "n_head": 2, **more}


_grouped = partial(sizes, num_key_value_heads=2)
_llama = partial(_grouped, head_dim=8)


def _padded() -> dict[str, Any]:
    given = attended(use_cache=False)
    given["attention_mask"][:, 5] = 0
    return given


def _everything() -> dict[str, Any]:
    given = call()
    tokens = given["input_ids"]
    return {**given, "token_type_ids": tokens % 3, "labels": tokens, "output_hidden_states": True}


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


_PIECES = chains(lambda n: (2 * n,), note="position encodings by numpy: three graphs, all adds in one of them")
_LANGUAGE = (
    architecture("gpt2", "GPT2LMHeadModel", _gpt),
    architecture("gpt2-everything", "GPT2LMHeadModel", _gpt, inputs=_everything),
    architecture("openai-gpt", "OpenAIGPTLMHeadModel", _gpt, inputs=lambda: {"input_ids": ids()}),
    architecture("gpt-bigcode", "GPTBigCodeForCausalLM", _gpt),
    architecture("gptj", "GPTJForCausalLM", lambda n: _gpt(n, rotary_dim=4, tie_word_embeddings=False), _ONE),
    architecture("codegen", "CodeGenForCausalLM", lambda n: _gpt(n, n_head=4, rotary_dim=4, n_ctx=64), _ONE),
    architecture("gpt-neo", "GPTNeoForCausalLM",
                 lambda n: {**SPECIAL, "hidden_size": 16, "num_layers": n, "num_heads": 2, "intermediate_size": 24,
                            "attention_types": [[["global"], n]], "max_position_embeddings": 64, "window_size": 8}),
    architecture("gpt-neox", "GPTNeoXForCausalLM", lambda n: sizes(n, use_parallel_residual=True), _ONE),
    architecture("gpt-neox-sequential", "GPTNeoXForCausalLM", lambda n: sizes(n, use_parallel_residual=False)),
    architecture("llama", "LlamaForCausalLM", _llama),
    architecture("llama-padded", "LlamaForCausalLM", lambda n: _llama(n, attn_implementation="eager"), inputs=_padded),
    architecture("llama-cache", "LlamaForCausalLM", _llama, inputs=lambda: {"input_ids": ids(), "use_cache": True}),
    architecture("llama-bfloat16", "LlamaForCausalLM", _llama, prepare=nn.Module.bfloat16, double=False, tolerance=5e-2,
                 because="computes in bfloat16"),
    architecture("llama-checkpointed", "LlamaForCausalLM", _llama, prepare=_checkpointed),
    architecture("mistral", "MistralForCausalLM", lambda n: _llama(n, sliding_window=8)),
    architecture("qwen2", "Qwen2ForCausalLM", _grouped),
    architecture("gemma3", "Gemma3ForCausalLM", lambda n: _llama(n, sliding_window=8, query_pre_attn_scalar=8)),
    architecture("gemma4", "Gemma4ForCausalLM",
                 lambda n: _llama(n, global_head_dim=8, sliding_window=8, vocab_size_per_layer_input=40,
                                  hidden_size_per_layer_input=8, num_kv_shared_layers=0,
                                  layer_types=_every_second(n, "sliding_attention", "full_attention")), per_layer(3)),
    architecture("phi", "PhiForCausalLM", sizes, _ONE),
    architecture("phi3", "Phi3ForCausalLM", _grouped),
    architecture("falcon", "FalconForCausalLM", lambda n: sizes(n, new_decoder_architecture=True, num_kv_heads=2), _ONE),
    architecture("opt", "OPTForCausalLM", lambda n: sizes(n, ffn_dim=24, word_embed_proj_dim=16)),
    architecture("opt-post", "OPTForCausalLM",
                 lambda n: sizes(n, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False)),
    architecture("bloom", "BloomForCausalLM", _bloom),
    architecture("bloom-normed-skip", "BloomForCausalLM",
                 lambda n: _bloom(n, apply_residual_connection_post_layernorm=True)),
    architecture("mpt", "MptForCausalLM",
                 lambda n: {**SPECIAL, "d_model": 16, "n_heads": 2, "n_layers": n, "max_seq_len": 64}),
    architecture("olmo", "OlmoForCausalLM", _grouped),
    architecture("olmo2", "Olmo2ForCausalLM", _grouped),
    architecture("granite", "GraniteForCausalLM",
                 lambda n: _grouped(n, residual_multiplier=0.22, attention_multiplier=0.25)),
    architecture("stablelm-parallel", "StableLmForCausalLM", lambda n: _grouped(n, use_parallel_residual=True), _ONE),
    architecture("nemotron", "NemotronForCausalLM", _llama),
    architecture("nanochat", "NanoChatForCausalLM", _llama),
    architecture("smollm3", "SmolLM3ForCausalLM", _llama),
    architecture("cohere", "CohereForCausalLM", _grouped, _ONE),
    architecture("glm4", "Glm4ForCausalLM", _llama),
    architecture("ctrl", "CTRLLMHeadModel", lambda n: _gpt(n, dff=24), _PIECES),
)  # fmt: skip


# Mixtures of experts: sums of experts inside the branch, losses of the router outside the trunk
_experts = partial(_grouped, num_experts_per_tok=2)
_qwen = partial(_experts, num_experts=4, moe_intermediate_size=8)
_four_experts = partial(_experts, num_local_experts=4)


def _deepseek(layers: int) -> dict[str, Any]:
    """Return settings of a dense layer, then experts with a shared one; latent attention."""
    return _experts(
        layers, moe_intermediate_size=8, n_shared_experts=1, n_routed_experts=4, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=2, topk_group=1,
    )  # fmt: skip


def _with_labels() -> dict[str, Any]:
    given = call()
    return {**given, "labels": given["input_ids"]}


_mixture = partial(architecture, double=False)
_STREAMS = chains(lambda _: (), note="has hyper-connections already: nothing to replace")
_MIXTURE = (
    _mixture("mixtral", "MixtralForCausalLM", _four_experts),
    _mixture("granitemoe", "GraniteMoeForCausalLM", lambda n: _four_experts(n, residual_multiplier=0.22)),
    _mixture("qwen2-moe", "Qwen2MoeForCausalLM", lambda n: _qwen(n, shared_expert_intermediate_size=8)),
    _mixture("qwen3-moe", "Qwen3MoeForCausalLM", lambda n: _qwen(n, head_dim=8, mlp_only_layers=[0])),
    _mixture("qwen3-moe-loss", "Qwen3MoeForCausalLM", lambda n: _qwen(n, head_dim=8, output_router_logits=True),
             inputs=_with_labels),
    _mixture("olmoe", "OlmoeForCausalLM", lambda n: _experts(n, num_experts=4)),
    _mixture("deepseek-v2", "DeepseekV2ForCausalLM", _deepseek),
    _mixture("deepseek-v3", "DeepseekV3ForCausalLM", _deepseek),
    _mixture("deepseek-v4", "DeepseekV4ForCausalLM",
             lambda n: sizes(n, num_key_value_heads=1, moe_intermediate_size=8), _STREAMS),
    _mixture("gpt-oss", "GptOssForCausalLM", lambda n: _four_experts(n, head_dim=8, sliding_window=8)),
)  # fmt: skip


# State-space models, recurrences and hybrids: scans full of additions that are no residual adds
_SCAN: dict[str, Any] = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
_MIXER: dict[str, Any] = {**_SCAN, "mamba_dt_rank": 4, "use_mamba_kernels": False}


def _mamba(layers: int, **more: Any) -> dict[str, Any]:
    return {**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": layers, "conv_kernel": 4, **more}


_state_space = partial(architecture, inputs=lambda: call(4))
_STATE_SPACE = (
    _state_space("mamba", "MambaForCausalLM", _mamba, _ONE),
    _state_space("mamba-bfloat16", "MambaForCausalLM", lambda n: _mamba(n, residual_in_fp32=True), _ONE,
                 prepare=nn.Module.bfloat16, double=False, tolerance=5e-2,
                 because="computes in bfloat16, on a float32 trunk"),
    _state_space("mamba2", "Mamba2ForCausalLM",
                 lambda n: _mamba(n, num_heads=4, head_dim=8, n_groups=2, chunk_size=8), _ONE),
    _state_space("falcon-mamba", "FalconMambaForCausalLM", _mamba, _ONE),
    _state_space("rwkv", "RwkvForCausalLM",
                 lambda n: {**SPECIAL, "hidden_size": 16, "num_hidden_layers": n, "context_length": 64}),
    # Attention and experts in every second layer.
    _state_space("jamba", "JambaForCausalLM",
                 lambda n: _grouped(n, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                                    expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, **_MIXER), double=False),
    # A shared attention layer before every mixer but the first, which alone reads its result.
    _state_space("zamba", "ZambaForCausalLM",
                 lambda n: _grouped(n + 1, n_mamba_heads=2, **_MIXER,
                                    layers_block_type=["linear_attention"] + ["hybrid"] * n), chains(lambda n: (n + 1,))),
    _state_space("zamba2", "Zamba2ForCausalLM",
                 lambda n: _grouped(n, n_mamba_heads=4, mamba_headdim=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1,
                                    layers_block_type=_every_second(n, "mamba", "hybrid"), **_SCAN), _ONE),
    _state_space("xlstm", "xLSTMForCausalLM", lambda n: {**SPECIAL, "hidden_size": 16, "num_blocks": n, "num_heads": 2}),
    _state_space("qwen3-next", "Qwen3NextForCausalLM",
                 lambda n: _qwen(n, head_dim=8, shared_expert_intermediate_size=8, linear_key_head_dim=8,
                                 linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
                                 layer_types=_every_second(n, "linear_attention", "full_attention")), double=False),
    _state_space("recurrent-gemma", "RecurrentGemmaForCausalLM",
                 lambda n: sizes(n, num_key_value_heads=1, lru_width=16, attention_window_size=8)),
)  # fmt: skip


# Encoders: most are post-norm, with a layer norm on the trunk after every add
def _labelled() -> dict[str, Any]:
    return attended(labels=torch.tensor([0, 1]))


_CONVOLVED = chains(
    lambda n: (2 * n,),
    note="after the first layer a convolution of the embeddings is added, which does not depend on its sum",
)
_encoder = partial(architecture, inputs=attended)
_ENCODERS = (
    _encoder("bert", "BertForMaskedLM", sizes),
    _encoder("bert-loss", "BertForSequenceClassification", sizes, inputs=_labelled),
    _encoder("roberta", "RobertaForMaskedLM", sizes),
    _encoder("roberta-pre-norm", "RobertaPreLayerNormForMaskedLM", sizes),
    _encoder("xlm-roberta-xl", "XLMRobertaXLForMaskedLM", sizes),
    _encoder("electra", "ElectraForPreTraining", lambda n: sizes(n, embedding_size=8)),
    _encoder("albert", "AlbertForMaskedLM", lambda n: sizes(n, embedding_size=8)),
    _encoder("distilbert", "DistilBertForMaskedLM",
             lambda n: {**SPECIAL, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": n, "max_position_embeddings": 64}),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM",
             lambda n: sizes(n, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
                             pos_att_type=["p2c", "c2p"], conv_kernel_size=3, conv_act="gelu"), _CONVOLVED),
    _encoder("modernbert", "ModernBertForMaskedLM",
             lambda n: sizes(n, cls_token_id=1, sep_token_id=2, local_attention=8)),
    _encoder("xlnet", "XLNetLMHeadModel", lambda n: {**SPECIAL, "d_model": 16, "n_layer": n, "n_head": 2, "d_inner": 24}),
    _encoder("mpnet", "MPNetForMaskedLM", sizes),
    _encoder("roformer", "RoFormerForMaskedLM", sizes),
    _encoder("megatron-bert", "MegatronBertForMaskedLM", sizes),
    _encoder("fnet", "FNetForMaskedLM", lambda n: sizes(n, use_tpu_fourier_optimizations=False),
             inputs=lambda: {"input_ids": ids()}),
)  # fmt: skip


# Encoder and decoder: two adds a layer in one, three in the other, and no trunk between them
def _bart(layers: int, **more: Any) -> dict[str, Any]:
    return {**SPECIAL, **sides(layers=layers, attention_heads=2, ffn_dim=24), "d_model": 16,
            "max_position_embeddings": 64, "decoder_start_token_id": 2, **more}  # fmt: skip


def _t5(layers: int) -> dict[str, Any]:
    return {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": layers, "num_decoder_layers": layers,
            "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip


def _prophet(layers: int) -> dict[str, Any]:
    counts = {f"num_{name}": value for name, value in sides(layers=layers, attention_heads=2).items()}
    return {**SPECIAL, **sides(ffn_dim=24), **counts, "hidden_size": 16, "max_position_embeddings": 64,
            "decoder_start_token_id": 1, "ngram": 2}  # fmt: skip


def _translated() -> dict[str, Any]:
    return {**call(8), "decoder_input_ids": ids(5)}


def _transcribed() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": ids(5), "use_cache": False}


_APART = chains(lambda n: (2 * n, 3 * n), note="several graphs; encoder and decoder are in different ones")
_pair = partial(architecture, inputs=_translated)
_ENCODER_DECODER = (
    _pair("t5", "T5ForConditionalGeneration", _t5, _PAIR),
    _pair("umt5", "UMT5ForConditionalGeneration", _t5, _PAIR),
    _pair("bart", "BartForConditionalGeneration", _bart, _PAIR),
    _pair("mbart", "MBartForConditionalGeneration", _bart, _PAIR),
    _pair("pegasus", "PegasusForConditionalGeneration", _bart, _PAIR),
    _pair("marian", "MarianMTModel", lambda n: _bart(n, decoder_vocab_size=40), _PAIR),
    _pair("whisper", "WhisperForConditionalGeneration",
          lambda n: _bart(n, num_mel_bins=4, max_source_positions=8, max_target_positions=16), _PAIR, inputs=_transcribed),
    _pair("prophetnet", "ProphetNetForConditionalGeneration", _prophet, _PAIR),
    _pair("led", "LEDForConditionalGeneration",
          lambda n: _bart(n, attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
          _APART),
)  # fmt: skip

FAMILIES: dict[str, tuple[Family, ...]] = {
    "language": _LANGUAGE,
    "mixture": _MIXTURE,
    "state_space": _STATE_SPACE,
    "encoders": _ENCODERS,
    "encoder_decoder": _ENCODER_DECODER,
}
