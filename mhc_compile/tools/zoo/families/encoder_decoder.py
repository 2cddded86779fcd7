"""Encoder-decoder models of transformers: an encoder of two adds a layer, a decoder of three, and no trunk between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import SPECIAL, architecture, ids
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_BOTH = chains(lambda n: (2 * n, 3 * n))


def _bart(layers: int, **more: Any) -> dict[str, Any]:
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", layers), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    return {**SPECIAL, **sides, "d_model": 16, "max_position_embeddings": 64, "decoder_start_token_id": 2, **more}


def _t5(layers: int, **more: Any) -> dict[str, Any]:
    return {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": layers, "num_decoder_layers": layers, "num_heads": 2,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, **more}  # fmt: skip


def _whisper(layers: int) -> dict[str, Any]:
    return {**_bart(layers), "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}


def _prophet(layers: int) -> dict[str, Any]:
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in (("ffn_dim", 24),)}
    counts = {f"num_{side}_{what}": value for side in ("encoder", "decoder") for what, value in
              (("layers", layers), ("attention_heads", 2))}  # fmt: skip
    return {
        **SPECIAL,
        **sides,
        **counts,
        "hidden_size": 16,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 1,
        "ngram": 2,
    }


def _call() -> dict[str, Any]:
    return {"input_ids": ids(8), "decoder_input_ids": ids(5), "use_cache": False}


def _speech() -> dict[str, Any]:
    import torch

    return {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": ids(5), "use_cache": False}


def _apart(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected((2 * layers, 3 * layers), note="several graphs; encoder and decoder lie in different ones")


def _family(
    name: str, kind: str, settings: Callable[[int], dict[str, Any]], expected: Any = _BOTH, **more: Any
) -> Family:
    model = more.pop("model", f"{kind}ForConditionalGeneration")
    return architecture(name, "encoder_decoder", kind, model, settings, more.pop("inputs", _call), expected, **more)


FAMILIES: tuple[Family, ...] = (
    _family("t5", "T5", _t5),
    _family("umt5", "UMT5", _t5),
    _family("bart", "Bart", _bart),
    _family("mbart", "MBart", _bart),
    _family("pegasus", "Pegasus", _bart),
    _family("marian", "Marian", lambda n: _bart(n, decoder_vocab_size=40), model="MarianMTModel"),
    _family("whisper", "Whisper", _whisper, inputs=_speech),
    _family("prophetnet", "ProphetNet", _prophet),
    _family(
        "led",
        "LED",
        lambda n: _bart(n, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=8),
        _apart,
    ),
)
