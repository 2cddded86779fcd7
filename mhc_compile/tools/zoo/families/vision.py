"""Vision transformers of transformers, flat and in stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SIZES, architecture, images
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_TWO = chains(lambda n: (2 * n,))


def _flat(layers: int, **more: Any) -> dict[str, Any]:
    return {**SIZES, "num_hidden_layers": layers, "image_size": 16, "patch_size": 8, "num_labels": 5, **more}


def _swin(layers: int, **more: Any) -> dict[str, Any]:
    return {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [layers, layers], "num_heads": [1, 2], "window_size": 4,
            "num_labels": 5, **more}  # fmt: skip


def _segformer(layers: int) -> dict[str, Any]:
    return {"num_encoder_blocks": 3, "depths": [layers] * 3, "sr_ratios": [4, 2, 1], "hidden_sizes": [8, 16, 24], "patch_sizes": [7, 3, 3],
            "strides": [4, 2, 2], "num_attention_heads": [1, 2, 2], "mlp_ratios": [2, 2, 2], "decoder_hidden_size": 8}  # fmt: skip


def _pvt(layers: int) -> dict[str, Any]:
    return {"image_size": 64, "depths": [layers] * 4, "hidden_sizes": [8, 16, 24, 32], "mlp_ratios": [2] * 4,
            "num_attention_heads": [1, 2, 2, 2], "num_labels": 5}  # fmt: skip


def _hiera(layers: int) -> dict[str, Any]:
    return {"embed_dim": 8, "image_size": [64, 64], "mlp_ratio": 2.0, "depths": [layers] * 4, "num_heads": [1, 2, 2, 4],
            "num_query_pool": 2, "num_labels": 5}  # fmt: skip


def _cvt(layers: int) -> dict[str, Any]:
    return {
        "embed_dim": [8, 16, 24],
        "num_heads": [1, 2, 3],
        "depth": [layers, layers, layers + 1],
        "drop_path_rate": [0.0, 0.0, 0.1],
        "num_labels": 5,
    }


def _focalnet(layers: int) -> dict[str, Any]:
    return {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [layers] * 2, "focal_levels": [2, 2], "focal_windows": [3, 3],
            "drop_path_rate": 0.1, "use_layerscale": True, "hidden_sizes": [8, 16], "num_labels": 5}  # fmt: skip


def _dpt(layers: int) -> dict[str, Any]:
    return _flat(
        layers + 2,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        is_hybrid=False,
    )


def _staged(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    """Each of three transitions projects the skip of its first add; its second add begins a chain."""
    later = 2 * layers - 1
    return Expected((2 * layers, later, later, later), projected=3)


def _refined(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(
        (2 * (layers + 2), 1, 2, 2, 2),
        note="the neck: a residual unit per level on what comes down, and one on what comes from the side, joined by a sum",
    )


def _family(
    name: str,
    kind: str,
    settings: Callable[[int], dict[str, Any]],
    expected: Any = _TWO,
    *,
    side: int = 16,
    **more: Any,
) -> Family:
    model = more.pop("model", f"{kind}ForImageClassification")
    return architecture(name, "vision", kind, model, settings, lambda: images(side), expected, **more)


FAMILIES: tuple[Family, ...] = (
    _family("vit", "ViT", _flat),
    _family("deit", "DeiT", _flat, model="DeiTForImageClassificationWithTeacher"),
    _family(
        "beit",
        "Beit",
        lambda n: _flat(n, use_relative_position_bias=True, drop_path_rate=0.1, layer_scale_init_value=0.1),
    ),
    _family("dinov2", "Dinov2", lambda n: _flat(n, mlp_ratio=2, drop_path_rate=0.1, layerscale_value=0.1)),
    _family(
        "dinov3", "DINOv3ViT", lambda n: _flat(n, num_register_tokens=2, drop_path_rate=0.1), model="DINOv3ViTModel"
    ),
    _family("vit-msn", "ViTMSN", _flat),
    _family("swin", "Swin", lambda n: _swin(n, drop_path_rate=0.1), chains(lambda n: (2 * n, 2 * n))),
    _family("swinv2", "Swinv2", _swin, chains(lambda n: (2 * n, 2 * n))),
    _family(
        "segformer",
        "Segformer",
        _segformer,
        chains(lambda n: (2 * n,) * 3),
        side=32,
        model="SegformerForSemanticSegmentation",
    ),
    _family("pvt", "Pvt", _pvt, chains(lambda n: (2 * n,) * 4), side=64),
    _family("hiera", "Hiera", _hiera, _staged, side=64),
    _family("cvt", "Cvt", _cvt, chains(lambda n: (2 * n, 2 * n, 2 * n + 2)), side=32),
    _family("focalnet", "FocalNet", _focalnet, chains(lambda n: (2 * n, 2 * n))),
    _family("dpt", "DPT", _dpt, _refined, model="DPTForDepthEstimation"),
)
