"""Convolutional networks of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import architecture, images
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_FIXED = "the depth belongs to the architecture"


def _convnext(layers: int) -> dict[str, Any]:
    return {"num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [layers] * 3, "patch_size": 2, "image_size": 16, "drop_path_rate": 0.1,
            "num_labels": 5}  # fmt: skip


def _resnet(layers: int, kind: str) -> dict[str, Any]:
    widths = [8, 16, 24] if kind == "basic" else [16, 32]
    return {
        "embedding_size": 8,
        "hidden_sizes": widths,
        "depths": [layers] * len(widths),
        "layer_type": kind,
        "num_labels": 5,
    }


def _regnet(layers: int) -> dict[str, Any]:
    return {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [layers] * 2,
        "groups_width": 4,
        "layer_type": "y",
        "num_labels": 5,
    }


def _bit(layers: int) -> dict[str, Any]:
    return {
        "embedding_size": 32,
        "hidden_sizes": [64, 128],
        "depths": [layers] * 2,
        "layer_type": "preactivation",
        "num_groups": 8,
        "num_labels": 5,
    }


def _upernet(layers: int) -> dict[str, Any]:
    from transformers import ConvNextConfig

    stages = [f"stage{index}" for index in range(1, 5)]
    backbone = ConvNextConfig(num_stages=4, hidden_sizes=[8, 12, 16, 24], depths=[layers] * 4, out_features=stages)  # type: ignore[call-arg]
    return {
        "backbone_config": backbone,
        "hidden_size": 16,
        "auxiliary_in_channels": 16,
        "auxiliary_channels": 8,
        "num_labels": 5,
    }


def _mobilevit(layers: int) -> dict[str, Any]:  # noqa: ARG001
    return {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 24], "num_attention_heads": 2,
            "mlp_ratio": 2.0, "num_labels": 5}  # fmt: skip


def _mobilenet_v2(layers: int) -> dict[str, Any]:  # noqa: ARG001
    return {"image_size": 32, "depth_multiplier": 0.35, "num_labels": 5}


def _swiftformer(layers: int) -> dict[str, Any]:
    return {"image_size": 64, "depths": [layers] * 4, "embed_dims": [8, 16, 24, 32], "num_labels": 5}


def _mobilenet(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected((1, 2, 3, 2, 2), note=_FIXED)


def _mobile_transformer(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(
        (1, 2, 4, 8, 6), note=f"{_FIXED}: convolutions, then transformers of 2, 4 and 3 layers at three resolutions"
    )


def _family(
    name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any, *, side: int = 16, **more: Any
) -> Family:
    model = more.pop("model", f"{kind}ForImageClassification")
    return architecture(name, "convolutional", kind, model, settings, lambda: images(side), expected, **more)


FAMILIES: tuple[Family, ...] = (
    _family("convnext", "ConvNext", _convnext, chains(lambda n: (n, n, n))),
    _family("convnextv2", "ConvNextV2", _convnext, chains(lambda n: (n, n, n))),
    _family(
        "hf-resnet", "ResNet", lambda n: _resnet(n, "basic"), chains(lambda n: (n, n - 1, n - 1), projected=2), side=32
    ),
    _family(
        "hf-resnet-bottleneck",
        "ResNet",
        lambda n: _resnet(n, "bottleneck"),
        chains(lambda n: (n - 1, n - 1), projected=2),
        side=32,
    ),
    _family("hf-regnet", "RegNet", _regnet, chains(lambda n: (n - 1, n - 1), projected=2), side=32),
    _family("bit", "Bit", _bit, chains(lambda n: (n - 1, n - 1), projected=2), side=32),
    _family(
        "mobilenet-v2",
        "MobileNetV2",
        _mobilenet_v2,
        _mobilenet,
        side=32,
    ),
    _family("mobilevit", "MobileViT", _mobilevit, _mobile_transformer, side=64),
    _family("swiftformer", "SwiftFormer", _swiftformer, chains(lambda n: (n + 2,) * 4), side=64),
    _family(
        "upernet", "UperNet", _upernet, chains(lambda n: (n, n, n, n)), side=64, model="UperNetForSemanticSegmentation"
    ),
)
