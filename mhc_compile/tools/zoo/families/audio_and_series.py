"""Speech and time series models of transformers. Layer drop and masking in time are off: they draw in Python, and break the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.tools.zoo.families.architectures import NOISY, SIZES, architecture
from mhc_compile.tools.zoo.family import Expected, Mode, chains

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.zoo.family import Family

__all__ = ["FAMILIES"]

_TWO = chains(lambda n: (2 * n,))


def _speech(layers: int, **more: Any) -> dict[str, Any]:
    return {**SIZES, "num_hidden_layers": layers, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
            "layerdrop": 0.0, "apply_spec_augment": False, **more}  # fmt: skip


def _spectrogram(layers: int) -> dict[str, Any]:
    return {
        **SIZES,
        "num_hidden_layers": layers,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
        "max_length": 8,
        "num_mel_bins": 8,
    }


def _forecast(layers: int, **more: Any) -> dict[str, Any]:
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("layers", layers), ("attention_heads", 2), ("ffn_dim", 16), ("layerdrop", 0.0))}  # fmt: skip
    return {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "d_model": 16,
        **sides,
        **more,
    }


def _patches(layers: int, **more: Any) -> dict[str, Any]:
    return {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16, "prediction_length": 4,
            "num_hidden_layers": layers, **more}  # fmt: skip


def _timesfm(layers: int) -> dict[str, Any]:
    return {"patch_length": 8, "context_length": 16, "horizon_length": 4, "freq_size": 3, "num_hidden_layers": layers, "hidden_size": 16,
            "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}  # fmt: skip


def _normal(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """Inputs of these names and shapes."""

    def make() -> dict[str, Any]:
        import torch

        return {name: torch.randn(*shape) for name, shape in shapes.items()}

    return make


def _forecast_inputs() -> dict[str, Any]:
    import torch

    past = {
        "past_values": (2, 10),
        "past_time_features": (2, 10, 1),
        "future_values": (2, 4),
        "future_time_features": (2, 4, 1),
    }
    return {**_normal(**past)(), "past_observed_mask": torch.ones(2, 10)}


def _timesfm_inputs() -> dict[str, Any]:
    import torch

    zeros = {name: torch.zeros(2, size, dtype=torch.long) for name, size in (("past_values_padding", 16), ("freq", 1))}
    return {"past_values": torch.randn(2, 16), **zeros}


def _distilled(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(
        (*(2,) * layers, 3 * layers),
        note="a convolution that halves the length stands between two layers of the encoder",
    )


def _positioned(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    """Positions are a convolution of the trunk, added to it: a site of its own, behind which stand a norm and a dropout."""
    return Expected((2 * layers + 1,))


def _family(
    name: str,
    kind: str,
    settings: Callable[[int], dict[str, Any]],
    model: str,
    inputs: Callable[[], dict[str, Any]],
    expected: Any = _TWO,
    *,
    double: bool = True,
) -> Family:
    speech = model == "ForCTC"
    because = f"the feature extractor sets requires_grad on a view of its input; {NOISY}" if speech else NOISY
    return architecture(
        name,
        "audio_and_series",
        kind,
        kind + model,
        settings,
        inputs,
        expected,
        double=double,
        because=because if double or speech else "",
        differentiable_inputs=not speech,
    )


_WAVE, _SERIES = _normal(input_values=(2, 200)), _normal(past_values=(2, 16, 2))
_PAIR = chains(lambda n: (2 * n, 3 * n))
FAMILIES: tuple[Family, ...] = (
    _family("hubert", "Hubert", _speech, "ForCTC", _WAVE, _positioned),
    _family("wav2vec2-stable", "Wav2Vec2", lambda n: _speech(n, do_stable_layer_norm=True), "ForCTC", _WAVE, _positioned),
    _family("wav2vec2-conformer", "Wav2Vec2Conformer",
            lambda n: _speech(n, position_embeddings_type="rotary", conv_depthwise_kernel_size=5), "ForCTC", _WAVE, chains(lambda n: (4 * n,))),
    _family("ast", "AST", _spectrogram, "ForAudioClassification", _normal(input_values=(2, 8, 8))),
    _family("patchtst", "PatchTST", lambda n: _patches(n, num_attention_heads=2, ffn_dim=24, path_dropout=0.1), "ForPrediction", _SERIES),
    _family("patchtsmixer", "PatchTSMixer", lambda n: _patches(n, num_layers=n, expansion_factor=2, mode="mix_channel"), "ForPrediction",
            _SERIES, chains(lambda n: (3 * n,))),
    _family("informer", "Informer", lambda n: _forecast(n, attention_type="prob", distil=True), "ForPrediction", _forecast_inputs, _distilled),
    _family("time-series-transformer", "TimeSeriesTransformer", _forecast, "ForPrediction", _forecast_inputs, _PAIR),
    _family("timesfm", "TimesFm", _timesfm, "Model", _timesfm_inputs, chains(lambda n: (2 * n,), projected=1), double=False),
)  # fmt: skip
