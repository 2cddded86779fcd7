"""Vision models of transformers: flat, in stages, convolutional, with text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mhc_compile.tools.zoo.families.architectures import SIZES, architecture, attended, images, sizes
from mhc_compile.tools.zoo.family import Family, chains, per_layer

_PAIR = per_layer(2, 2)


_small, _medium, _large = (partial(architecture, inputs=partial(images, side)) for side in (16, 32, 64))


# Transformers
def _flat(layers: int, **more: Any) -> dict[str, Any]:
    return {**SIZES, "num_hidden_layers": layers, "image_size": 16, "patch_size": 8, "num_labels": 5, **more}


_dropping = partial(_flat, drop_path_rate=0.1)


def _swin(layers: int, **more: Any) -> dict[str, Any]:
    return {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [layers] * 2, "num_heads": [1, 2],
            "window_size": 4, "num_labels": 5, **more}  # fmt: skip


#: Each of three transitions projects the skip of its first add; its second add begins a chain.
_STAGED = chains(lambda n: (2 * n, 2 * n - 1, 2 * n - 1, 2 * n - 1))
_REFINED = chains(
    lambda n: (2 * (n + 2), 1, 2, 2, 2),
    note="the neck: at each level a residual unit on the level above and one on the encoder's, joined by a sum",
)
_VISION = (
    _small("vit", "ViTForImageClassification", _flat),
    _small("deit", "DeiTForImageClassificationWithTeacher", _flat),
    _small("beit", "BeitForImageClassification",
           lambda n: _dropping(n, use_relative_position_bias=True, layer_scale_init_value=0.1)),
    _small("dinov2", "Dinov2ForImageClassification", lambda n: _dropping(n, mlp_ratio=2, layerscale_value=0.1)),
    _small("dinov3", "DINOv3ViTModel", lambda n: _dropping(n, num_register_tokens=2)),
    _small("vit-msn", "ViTMSNForImageClassification", _flat),
    _small("swin", "SwinForImageClassification", lambda n: _swin(n, drop_path_rate=0.1), _PAIR),
    _small("swinv2", "Swinv2ForImageClassification", _swin, _PAIR),
    _medium("segformer", "SegformerForSemanticSegmentation",
            lambda n: {"num_encoder_blocks": 3, "depths": [n] * 3, "sr_ratios": [4, 2, 1], "hidden_sizes": [8, 16, 24],
                       "patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "num_attention_heads": [1, 2, 2],
                       "mlp_ratios": [2, 2, 2], "decoder_hidden_size": 8}, per_layer(2, 2, 2)),
    _large("pvt", "PvtForImageClassification",
           lambda n: {"image_size": 64, "depths": [n] * 4, "hidden_sizes": [8, 16, 24, 32], "mlp_ratios": [2] * 4,
                      "num_attention_heads": [1, 2, 2, 2], "num_labels": 5}, per_layer(2, 2, 2, 2)),
    _large("hiera", "HieraForImageClassification",
           lambda n: {"embed_dim": 8, "image_size": [64, 64], "mlp_ratio": 2.0, "depths": [n] * 4, "num_heads": [1, 2, 2, 4],
                      "num_query_pool": 2, "num_labels": 5}, _STAGED),
    _medium("cvt", "CvtForImageClassification",
            lambda n: {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [n, n, n + 1], "num_labels": 5,
                       "drop_path_rate": [0.0, 0.0, 0.1]}, chains(lambda n: (2 * n, 2 * n, 2 * n + 2))),
    _small("focalnet", "FocalNetForImageClassification",
           lambda n: {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [n] * 2, "hidden_sizes": [8, 16],
                      "focal_levels": [2, 2], "focal_windows": [3, 3], "drop_path_rate": 0.1, "use_layerscale": True,
                      "num_labels": 5}, _PAIR),
    _small("dpt", "DPTForDepthEstimation",
           lambda n: _flat(n + 2, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
                           fusion_hidden_size=8, is_hybrid=False), _REFINED),
)  # fmt: skip


# Convolutional networks
def _convnext(layers: int) -> dict[str, Any]:
    return {"num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [layers] * 3, "patch_size": 2, "image_size": 16,
            "drop_path_rate": 0.1, "num_labels": 5}  # fmt: skip


def _stages(layers: int, kind: str, *widths: int, stem: int = 8, **more: Any) -> dict[str, Any]:
    return {"embedding_size": stem, "hidden_sizes": list(widths), "depths": [layers] * len(widths),
            "layer_type": kind, "num_labels": 5, **more}  # fmt: skip


def _upernet(layers: int) -> dict[str, Any]:
    from transformers import ConvNextConfig

    stages = [f"stage{index}" for index in range(1, 5)]
    backbone = ConvNextConfig(num_stages=4, hidden_sizes=[8, 12, 16, 24], depths=[layers] * 4, out_features=stages)  # type: ignore[call-arg]
    return {"backbone_config": backbone, "hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8,
            "num_labels": 5}  # fmt: skip


_SHORTER = chains(lambda n: (n - 1, n - 1))
_BASIC = chains(lambda n: (n, n - 1, n - 1))
_FIXED = "the depth belongs to the architecture"
_MOBILENET = chains(lambda _: (1, 2, 3, 2, 2), note=_FIXED)
_MOBILEVIT = chains(
    lambda _: (1, 2, 4, 8, 6),
    note=f"{_FIXED}: convolutions, then transformers of 2, 4 and 3 layers at three resolutions",
)
_CONVOLUTIONAL = (
    _small("convnext", "ConvNextForImageClassification", _convnext, per_layer(1, 1, 1)),
    _small("convnextv2", "ConvNextV2ForImageClassification", _convnext, per_layer(1, 1, 1)),
    _medium("hf-resnet", "ResNetForImageClassification", lambda n: _stages(n, "basic", 8, 16, 24), _BASIC),
    _medium("hf-resnet-bottleneck", "ResNetForImageClassification", lambda n: _stages(n, "bottleneck", 16, 32), _SHORTER),
    _medium("hf-regnet", "RegNetForImageClassification", lambda n: _stages(n, "y", 8, 16, groups_width=4), _SHORTER),
    _medium("bit", "BitForImageClassification",
            lambda n: _stages(n, "preactivation", 64, 128, stem=32, num_groups=8), _SHORTER),
    _medium("mobilenet-v2", "MobileNetV2ForImageClassification",
            lambda _: {"image_size": 32, "depth_multiplier": 0.35, "num_labels": 5}, _MOBILENET),
    _large("mobilevit", "MobileViTForImageClassification",
           lambda _: {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 24],
                      "num_attention_heads": 2, "mlp_ratio": 2.0, "num_labels": 5}, _MOBILEVIT),
    _large("swiftformer", "SwiftFormerForImageClassification",
           lambda n: {"image_size": 64, "depths": [n] * 4, "embed_dims": [8, 16, 24, 32], "num_labels": 5},
           chains(lambda n: (n + 2,) * 4)),
    _large("upernet", "UperNetForSemanticSegmentation", _upernet, per_layer(1, 1, 1, 1)),
)  # fmt: skip


# Text and images: two towers, or one that feeds the other
def _towers(layers: int, **text: Any) -> dict[str, Any]:
    vision = {**SIZES, "num_hidden_layers": layers, "image_size": 16, "patch_size": 8}
    return {"text_config": sizes(layers, **text), "vision_config": vision, "projection_dim": 8}


def _blip(layers: int) -> dict[str, Any]:
    both = _towers(layers, projection_dim=8, encoder_hidden_size=16, sep_token_id=2)
    return {**both, "image_text_hidden_size": 8}


def _llava(layers: int) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(**_towers(layers)["vision_config"])
    text = LlamaConfig(**sizes(layers, num_key_value_heads=2))
    return {"vision_config": vision, "text_config": text, "image_token_id": 39, "vision_feature_layer": -1}


def _interleaved() -> dict[str, Any]:
    given = torch.cat([torch.full((2, 4), 39), torch.randint(3, 38, (2, 4))], dim=1)
    return {"input_ids": given, "use_cache": False, **images()}


_POOLED = chains(lambda n: (2 * n, 2 * n, 1), note="the head pools by attention and adds an MLP")
_tower = partial(architecture, inputs=lambda: {**attended(), **images()})
_MULTIMODAL = (
    _tower("clip", "CLIPModel", lambda n: _towers(n, projection_dim=8), _PAIR),
    _tower("siglip", "SiglipModel", lambda n: _towers(n, projection_size=16), _POOLED),
    _tower("blip", "BlipForConditionalGeneration", _blip, per_layer(2, 3)),
    _tower("llava", "LlavaForConditionalGeneration", _llava, _PAIR, inputs=_interleaved),
)

FAMILIES: dict[str, tuple[Family, ...]] = {
    "vision": _VISION,
    "convolutional": _CONVOLUTIONAL,
    "multimodal": _MULTIMODAL,
}
