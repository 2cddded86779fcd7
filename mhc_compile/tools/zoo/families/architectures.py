"""How a family of transformers models is written down: a config class, a model class, settings by depth. Weights are random, nothing is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.family import Family

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Case, Expect

__all__ = ["BATCH", "IMAGE", "NOISY", "SIZES", "SPECIAL", "architecture", "ids", "images", "sizes"]

BATCH = 2
#: Side of the images.
IMAGE = 16
#: The usual names of sizes. Widths are as small as the architectures allow.
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
#: A vocabulary and its special tokens.
SPECIAL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Why a family is compared in float64.
NOISY = "gradients that are zero in exact arithmetic (the bias of k) are noise in float32"


def sizes(layers: int, **more: Any) -> dict[str, Any]:
    """Settings under their usual names, for a text model of so many layers."""
    return {**SIZES, **SPECIAL, "num_hidden_layers": layers, "max_position_embeddings": 64, **more}


def ids(length: int = 6) -> Any:
    """Token ids [2, length], none of them special."""
    import torch

    return torch.randint(3, 40, (BATCH, length))


def images(side: int = IMAGE) -> dict[str, Any]:
    """Images [2, 3, side, side]."""
    import torch

    return {"pixel_values": torch.randn(BATCH, 3, side, side)}


def architecture(
    name: str,
    group: str,
    config: str,
    model: str,
    settings: Callable[[int], dict[str, Any]],
    inputs: Callable[[], dict[str, Any]],
    expected: Expect,
    *,
    prepare: Callable[[Any], Any] | None = None,
    double: bool = True,
    tolerance: float = 1e-5,
    because: str = NOISY,
    differentiable_inputs: bool = True,
) -> Family:
    """A family of transformers models.

    Args:
        name: of the family.
        group: the theme.
        config: name of the config class in transformers, without "Config".
        model: name of the model class.
        settings: depth to the arguments of the config.
        inputs: the arguments of the call.
        expected: the structure.
        prepare: what is done to the model before it is used.
        double: see `Family`.
        tolerance: see `Family`.
        because: see `Family`.
        differentiable_inputs: see `Family`.
    """

    def make(layers: int) -> Case:
        import transformers

        transformers.logging.set_verbosity_error()
        built = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**settings(layers)))
        return prepare(built) if prepare is not None else built, (), inputs()

    return Family(
        name,
        group,
        make,
        expected,
        "transformers",
        tolerance=tolerance,
        double=double,
        because=because,
        differentiable_inputs=differentiable_inputs,
    )
