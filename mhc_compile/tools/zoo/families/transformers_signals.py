"""Speech and time series models of transformers.

Layer drop and masking in time are off: they draw in Python, and break the graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mhc_compile.tools.zoo.families.architectures import NOISY, SIZES, architecture, normal, sides
from mhc_compile.tools.zoo.family import Family, chains, per_layer


def _speech(layers: int, **more: Any) -> dict[str, Any]:
    return {**SIZES, "num_hidden_layers": layers, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
            "vocab_size": 20, "layerdrop": 0.0, "apply_spec_augment": False, **more}  # fmt: skip


def _patches(layers: int, **more: Any) -> dict[str, Any]:
    return {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16,
            "prediction_length": 4, "num_hidden_layers": layers, **more}  # fmt: skip


def _forecast(layers: int, **more: Any) -> dict[str, Any]:
    return {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
            **sides(layers=layers, attention_heads=2, ffn_dim=16, layerdrop=0.0), **more}  # fmt: skip


def _forecast_inputs() -> dict[str, Any]:
    drawn = normal(
        past_values=(2, 10), past_time_features=(2, 10, 1), future_values=(2, 4), future_time_features=(2, 4, 1)
    )
    return {**drawn(), "past_observed_mask": torch.ones(2, 10)}


def _timesfm_inputs() -> dict[str, Any]:
    zeros = {name: torch.zeros(2, size, dtype=torch.long) for name, size in (("past_values_padding", 16), ("freq", 1))}
    return {"past_values": torch.randn(2, 16), **zeros}


#: Positions are a convolution of the trunk that is added to it: a site before a norm and a dropout.
_POSITIONED = chains(lambda n: (2 * n + 1,))
_DISTILLED = chains(
    lambda n: (*(2,) * n, 3 * n),
    note="a convolution that halves the length stands between two layers of the encoder",
)
_recognition = partial(
    architecture,
    inputs=normal(input_values=(2, 200)),
    because=f"the feature extractor sets requires_grad on a view of its input; {NOISY}",
    differentiable_inputs=False,
)
_series = partial(architecture, inputs=normal(past_values=(2, 16, 2)))
_forecasting = partial(architecture, inputs=_forecast_inputs)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "audio_and_series": (
        _recognition("hubert", "HubertForCTC", _speech, _POSITIONED),
        _recognition("wav2vec2-stable", "Wav2Vec2ForCTC", lambda n: _speech(n, do_stable_layer_norm=True), _POSITIONED),
        _recognition("wav2vec2-conformer", "Wav2Vec2ConformerForCTC",
                     lambda n: _speech(n, position_embeddings_type="rotary", conv_depthwise_kernel_size=5), per_layer(4)),
        architecture("ast", "ASTForAudioClassification",
                     lambda n: {**SIZES, "num_hidden_layers": n, "patch_size": 4, "frequency_stride": 4, "time_stride": 4,
                                "max_length": 8, "num_mel_bins": 8}, inputs=normal(input_values=(2, 8, 8))),
        _series("patchtst", "PatchTSTForPrediction",
                lambda n: _patches(n, num_attention_heads=2, ffn_dim=24, path_dropout=0.1)),
        _series("patchtsmixer", "PatchTSMixerForPrediction",
                lambda n: _patches(n, num_layers=n, expansion_factor=2, mode="mix_channel"), per_layer(3)),
        _forecasting("informer", "InformerForPrediction",
                     lambda n: _forecast(n, attention_type="prob", distil=True), _DISTILLED),
        _forecasting("time-series-transformer", "TimeSeriesTransformerForPrediction", _forecast, per_layer(2, 3)),
        architecture("timesfm", "TimesFmModel",
                     lambda n: {**SIZES, "intermediate_size": 16, "num_hidden_layers": n, "patch_length": 8, "head_dim": 8,
                                "context_length": 16, "horizon_length": 4, "freq_size": 3},
                     inputs=_timesfm_inputs, double=False),
    ),
}  # fmt: skip
