"""The models: classes of transformers, unmodified, from small configurations. No weights are downloaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mhc_compile.tools.demo.settings import HEAD, PATCH, Settings
from mhc_compile.tools.demo.tasks import stable_seed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model"]


def build_model(settings: Settings, classes: int) -> nn.Module:
    """The model that `settings` ask for, its initial weights a function of the seed alone.

    Its forward takes ids int64 [batch, context] and returns `.logits` [batch, context, classes] (gpt2, llama), or
    images float32 [batch, 1, side, side] and `.logits` [batch, classes] (vit).
    """
    torch.manual_seed(stable_seed("weights", settings.seed))
    return {"gpt2": _gpt2, "llama": _llama, "vit": _vit}[settings.model](settings, classes)


def _gpt2(settings: Settings, classes: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=classes,
            n_positions=settings.context,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.width // HEAD,
            resid_pdrop=settings.dropout,
            embd_pdrop=settings.dropout,
            attn_pdrop=settings.dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _llama(settings: Settings, classes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=classes,
            max_position_embeddings=settings.context,
            hidden_size=settings.width,
            intermediate_size=8 * settings.width // 3 // 8 * 8,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.width // HEAD,
            num_key_value_heads=settings.width // HEAD,
            attention_dropout=settings.dropout,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _vit(settings: Settings, classes: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=PATCH * math.isqrt(settings.context),
        patch_size=PATCH,
        num_channels=1,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // HEAD,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )
    config.num_labels = classes
    return ViTForImageClassification(config)
