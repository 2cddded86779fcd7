"""Families of transformers models: model class, settings by depth, inputs. Weights are random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.tools.zoo.family import Case, Expect, Family, per_layer

if TYPE_CHECKING:
    from collections.abc import Callable

#: Sizes under their usual names. Widths are as small as the architectures allow.
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
#: A vocabulary and its special tokens.
SPECIAL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Why a family is compared in float64.
NOISY = "gradients that are zero in exact arithmetic (the bias of k) are noise in float32"


def sizes(layers: int, **more: Any) -> dict[str, Any]:
    """Return settings for a text model of so many layers, under their usual names."""
    return {**SIZES, **SPECIAL, "num_hidden_layers": layers, "max_position_embeddings": 64, **more}


def sides(**settings: Any) -> dict[str, Any]:
    """Return the settings once with the prefix `encoder_` and once with `decoder_`."""
    return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in settings.items()}


def ids(length: int = 6) -> torch.Tensor:
    """Return token ids [2, length], none of them special."""
    return torch.randint(3, 40, (2, length))


def call(length: int = 6) -> dict[str, Any]:
    """Return the arguments of a language model that is called without a cache."""
    return {"input_ids": ids(length), "use_cache": False}


def attended(**more: Any) -> dict[str, Any]:
    """Return token ids with an attention mask of ones."""
    given = ids()
    return {"input_ids": given, "attention_mask": torch.ones_like(given), **more}


def images(side: int = 16) -> dict[str, Any]:
    """Return images [2, 3, side, side]."""
    return {"pixel_values": torch.randn(2, 3, side, side)}


def normal(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """Return a function that draws inputs of these names and shapes."""
    return lambda: {name: torch.randn(*shape) for name, shape in shapes.items()}


def architecture(
    name: str, model: str, settings: Callable[[int], dict[str, Any]], expected: Expect | None = None, *,
    inputs: Callable[[], dict[str, Any]] = call, prepare: Callable[[Any], Any] | None = None, double: bool = True,
    because: str = "", **more: Any,
) -> Family:  # fmt: skip
    """Return the family of the transformers class `model`; `more` are fields of `Family`.

    `settings` maps the depth to the arguments of the config, `inputs` draws those of the call,
    `prepare` changes the model before it is used. By default a layer has two sites of one chain.
    """

    def make(layers: int) -> Case:
        import transformers

        transformers.logging.set_verbosity_error()
        kind = getattr(transformers, model)
        built = kind(kind.config_class(**settings(layers)))
        return built if prepare is None else prepare(built), (), inputs()

    because = because or (NOISY if double else "")
    return Family(name, make, expected or per_layer(2), "transformers", double=double, because=because, **more)
