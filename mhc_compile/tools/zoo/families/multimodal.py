"""Models of text and images of transformers: towers side by side, or one behind the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SIZES, architecture, ids, images, sizes
from mhc_compile.tools.zoo.family import chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]


def _towers(layers: int) -> dict[str, Any]:
    vision = {**SIZES, "num_hidden_layers": layers, "image_size": 16, "patch_size": 8}
    return {"text_config": sizes(layers, projection_dim=8), "vision_config": vision, "projection_dim": 8}


def _siglip(layers: int) -> dict[str, Any]:
    return {**_towers(layers), "text_config": sizes(layers, projection_size=16)}


def _blip(layers: int) -> dict[str, Any]:
    both = _towers(layers)
    text = {**both["text_config"], "encoder_hidden_size": 16, "sep_token_id": 2}
    return {**both, "text_config": text, "image_text_hidden_size": 8}


def _llava(layers: int) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(**_towers(layers)["vision_config"])
    text = LlamaConfig(**sizes(layers, num_key_value_heads=2))
    return {"vision_config": vision, "text_config": text, "image_token_id": 39, "vision_feature_layer": -1}


def _both() -> dict[str, Any]:
    import torch

    given = ids()
    return {"input_ids": given, "attention_mask": torch.ones_like(given), **images()}


def _interleaved() -> dict[str, Any]:
    import torch

    given = torch.cat([torch.full((2, 4), 39), torch.randint(3, 38, (2, 4))], dim=1)
    return {"input_ids": given, "use_cache": False, **images()}


def _family(name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any, **more: Any) -> Family:
    model = more.pop("model", f"{kind}Model")
    return architecture(name, "multimodal", kind, model, settings, more.pop("inputs", _both), expected, **more)


_PAIR = chains(lambda n: (2 * n, 2 * n))
FAMILIES: tuple[Family, ...] = (
    _family("clip", "CLIP", _towers, _PAIR),
    _family(
        "siglip",
        "Siglip",
        _siglip,
        chains(lambda n: (2 * n, 2 * n, 1), note="the head pools by attention and adds an MLP"),
    ),
    _family("blip", "Blip", _blip, chains(lambda n: (2 * n, 3 * n)), model="BlipForConditionalGeneration"),
    _family("llava", "Llava", _llava, _PAIR, model="LlavaForConditionalGeneration", inputs=_interleaved),
)
