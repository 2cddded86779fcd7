"""Example inputs for a transformers model, by the names of what its `forward` needs. Guesses: the first one that the model runs with counts."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["guesses", "needed", "nested_configs"]

_BATCH = 2
_LENGTH = 16
#: Ids at the end of a tiny vocabulary are those of special tokens.
_SPECIAL = 64
_MOST = 12
#: What some models need although it has a default.
_EXTRA = (
    "pixel_values",
    "input_ids",
    "input_features",
    "bbox",
    "encoder_hidden_states",
    "attention_mask",
    "future_values",
    "image_grid_thw",
)


def needed(model: Any) -> list[str]:
    """The names that `forward` of this model must be given: those without a default, the main input, and ids for a decoder."""
    parameters = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, entry in parameters.items() if entry.default is entry.empty and entry.kind in kinds]
    main = getattr(model, "main_input_name", "")
    if main in parameters and main not in names:
        names.insert(0, main)
    if not names:
        names = [
            name for name in ("input_ids", "pixel_values", "inputs_embeds", "hidden_states") if name in parameters
        ][:1]
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    return list(dict.fromkeys(names))


def guesses(model: Any) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments to try, the most usual first. Raises KeyError with the name of an input for which there is no guess."""
    names = needed(model)
    sizes = _Sizes(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        choices = [_MAKERS[name](sizes) for name in names]
        optional = inspect.signature(model.forward).parameters
        for chosen in itertools.islice(itertools.product(*choices), _MOST):
            yield dict(zip(names, chosen, strict=True))
        extra = [name for name in _EXTRA if name in optional and name not in names]
        more = [[name] for name in extra] + [list(pair) for pair in itertools.combinations(extra, 2)]
        for added in more:  # a CLIP wants both text and image, although both have a default
            chosen_for = [*choices, *(_MAKERS[name](sizes) for name in added)]
            for chosen in itertools.islice(itertools.product(*chosen_for), _MOST):
                yield dict(zip([*names, *added], chosen, strict=True))


class _Sizes:
    """Sizes in a config or, where it has none, in the configs nested in it."""

    def __init__(self, config: Any) -> None:
        self.configs = list(nested_configs(config))

    def find(self, *names: str, default: Any = None) -> Any:
        for config in self.configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    @property
    def image(self) -> tuple[int, int]:
        size = self.find("image_size", "img_size", "input_size", default=64)
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        return (
            (size, size)
            if isinstance(size, int)
            else (int(size[-2]), int(size[-1]))
            if len(size) > 1
            else (int(size[0]),) * 2
        )

    @property
    def channels(self) -> int:
        value = self.find("num_channels", "in_channels", "in_chans", "num_channels_in", default=3)
        return value if isinstance(value, int) else 3

    @property
    def patch(self) -> int:
        size = self.find("patch_size", "spatial_patch_size", default=16)
        return int(size if isinstance(size, int) else size[-1])

    @property
    def width(self) -> int:
        return int(self.find("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim", default=32))


def nested_configs(config: Any) -> Iterator[Any]:
    """The config and those in it."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


def _ids(sizes: _Sizes) -> list[Tensor]:
    vocabulary = sizes.find("vocab_size", "encoder_vocab_size", default=64)
    known = max(int(vocabulary) - _SPECIAL if vocabulary > 2 * _SPECIAL else int(vocabulary) // 2, 2)
    ids = 3 + torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) * 7 % max(known - 3, 1)
    ids = ids.clamp(max=max(int(vocabulary) - 1, 0))
    books = sizes.find("num_codebooks", "n_codebooks", default=4)
    many = [ids[..., None].expand(-1, -1, count) for count in (books, books + 1)] if isinstance(books, int) else []
    return [ids, *many, ids[:1]]


def _pixels(sizes: _Sizes) -> list[Tensor]:
    frames = sizes.find("num_frames", "frames_per_clip", "num_image_frames")
    height, width = sizes.image
    image = torch.randn(_BATCH, sizes.channels, height, width)
    patch = sizes.patch
    flat = torch.randn(_BATCH, 16, sizes.channels * patch * patch)
    found = [image]
    if isinstance(frames, int) and frames:
        found.insert(0, torch.randn(1, frames, sizes.channels, height, width))
    found += [
        flat,
        torch.randn(_BATCH, sizes.channels, 224, 224),
        torch.randn(_BATCH, 1, sizes.channels, height, width),
        torch.randn(1, 2, sizes.channels, height, width),
        torch.randn(_BATCH, 1, height, width),
        torch.randn(_grid_patches(sizes)),
    ]
    return found


def _grid_patches(sizes: _Sizes) -> tuple[int, int]:
    temporal = sizes.find("temporal_patch_size", default=1)
    return 16, sizes.channels * temporal * sizes.patch**2


def _features(sizes: _Sizes) -> list[Tensor]:
    mel = sizes.find(
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "n_mels",
        "feature_projection_input_dim",
        "input_dim",
        "mel_bins",
        default=80,
    )
    longest = sizes.find("max_source_positions", "max_length", "n_window", default=32)
    time = 2 * int(longest) if isinstance(longest, int) else 64
    found = [torch.randn(_BATCH, mel, time), torch.randn(_BATCH, 64, mel), torch.randn(_BATCH, 160, mel)]
    spectrum = sizes.find("spec_size", default=256)
    found += [torch.randn(_BATCH, 1, 4 * int(spectrum), int(sizes.find("num_mel_bins", default=64)))]
    return [*found, torch.randn(_BATCH, 4000), torch.randn(_BATCH, mel, 64), torch.randn(mel, 64)]


def _waves(sizes: _Sizes) -> list[Tensor]:
    mel = sizes.find("num_mel_bins", "input_feat_per_channel", default=80)
    longest = sizes.find("max_length", default=256)
    channels = sizes.find("audio_channels", "in_channels", default=1)
    found = [torch.randn(_BATCH, longest, mel)] if sizes.find("frequency_stride") is not None else []
    channels = channels if isinstance(channels, int) else 1
    return [*found, torch.randn(_BATCH, 6400), torch.randn(_BATCH, channels, 6400), torch.randn(_BATCH, 64, mel)]


def _series(sizes: _Sizes) -> list[Tensor]:
    context = int(sizes.find("context_length", default=32))
    lags = sizes.find("lags_sequence", default=[0])
    longest = context + (max(lags) if isinstance(lags, (list, tuple)) and lags else 0)
    channels = int(sizes.find("num_input_channels", "input_size", "num_input_channels", default=1))
    return [
        torch.randn(_BATCH, context, channels),
        torch.randn(_BATCH, longest),
        torch.randn(_BATCH, context),
        torch.randn(_BATCH, longest, channels),
    ]


def _history(sizes: _Sizes) -> list[Tensor]:
    lags = sizes.find("lags_sequence", default=[0])
    length = int(sizes.find("context_length", "prediction_length", default=8)) + max(lags)
    return [torch.randn(_BATCH, length, int(sizes.find("num_time_features", default=0)))]


def _future(sizes: _Sizes) -> list[Tensor]:
    return [torch.randn(_BATCH, int(sizes.find("prediction_length", default=8)))]


def _history_values(sizes: _Sizes) -> list[Tensor]:
    if sizes.find("lags_sequence") is None:
        return _series(sizes)
    lags = sizes.find("lags_sequence")
    length = int(sizes.find("context_length", "prediction_length", default=8) or 8) + max(lags)
    return [torch.randn(_BATCH, length)]


def _observed(sizes: _Sizes) -> list[Tensor]:
    return [torch.ones_like(value) for value in _history_values(sizes)]


def _hidden(sizes: _Sizes) -> list[Tensor]:
    patches, width = _grid_patches(sizes)
    return [
        torch.randn(_BATCH, _LENGTH, sizes.width),
        torch.randn(patches, width),
        torch.randn(_LENGTH, sizes.width),
        torch.randn(_BATCH, sizes.width, _LENGTH),
        torch.randn(_BATCH, sizes.width, 8, 8),
    ]


def _boxes(sizes: _Sizes) -> list[Tensor]:  # noqa: ARG001
    return [torch.zeros(_BATCH, _LENGTH, 4, dtype=torch.long)]


def _ones(sizes: _Sizes) -> list[Tensor]:
    return [
        torch.ones(_BATCH, _LENGTH, dtype=torch.long),
        torch.ones(_BATCH, 64, dtype=torch.long),
        torch.ones(_BATCH, *sizes.image, dtype=torch.long),
    ]


def _zeros(sizes: _Sizes) -> list[Tensor]:  # noqa: ARG001
    return [torch.zeros(_BATCH, _LENGTH, dtype=torch.long)]


def _grid(sizes: _Sizes) -> list[Tensor]:  # noqa: ARG001
    return [torch.tensor([[1, 4, 4]]), torch.tensor([[4, 4]])]


def _shapes(sizes: _Sizes) -> list[Tensor]:  # noqa: ARG001
    return [torch.tensor([[4, 4]] * _BATCH)]


def _patch_mask(sizes: _Sizes) -> list[Tensor]:
    return [torch.ones(_BATCH, 16, dtype=torch.long), torch.ones(_BATCH, *sizes.image, dtype=torch.long)]


def _flattened(sizes: _Sizes) -> list[Tensor]:
    """Patches behind their row and column, as Pix2Struct takes them."""
    places = torch.stack([1 + torch.arange(16) // 4, 1 + torch.arange(16) % 4], -1).expand(_BATCH, -1, -1)
    return [torch.cat([places, torch.randn(_BATCH, 16, sizes.channels * sizes.patch**2)], -1)]


def _states(sizes: _Sizes) -> list[Tensor]:
    return [torch.randn(_BATCH, _LENGTH, int(sizes.find("state_dim", default=17)))]


def _actions(sizes: _Sizes) -> list[Tensor]:
    return [torch.randn(_BATCH, _LENGTH, int(sizes.find("act_dim", default=4)))]


def _scalars(sizes: _Sizes) -> list[Tensor]:  # noqa: ARG001
    return [torch.randn(_BATCH, _LENGTH, 1)]


def _features_mask(sizes: _Sizes) -> list[Tensor]:
    lengths = dict.fromkeys(value.shape[index] for value in _features(sizes) for index in (-1, 1) if value.dim() > 2)
    return [torch.ones(_BATCH, length, dtype=torch.bool) for length in lengths]


_MAKERS: dict[str, Callable[[_Sizes], list[Tensor]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "text_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "images": _pixels,
    "flattened_patches": _flattened,
    "qformer_input_ids": _ids,
    "inputs": _ids,
    "input_token_ids": _ids,
    "labels": _ids,
    "input_features": _features,
    "audio_features": _features,
    "input_values": _waves,
    "audio_values": _waves,
    "past_values": _history_values,
    "future_values": _future,
    "past_time_features": _history,
    "past_observed_mask": _observed,
    "hidden_states": _hidden,
    "inputs_embeds": _hidden,
    "query_embeds": _hidden,
    "encoder_hidden_states": _hidden,
    "states": _states,
    "actions": _actions,
    "rewards": _scalars,
    "returns_to_go": _scalars,
    "timesteps": _zeros,
    "spectrogram": _features,
    "audio_mel": _features,
    "audio_mel_mask": _features_mask,
    "input_features_mask": _features_mask,
    "image": _pixels,
    "hidden_state": _hidden,
    "x": _hidden,
    "bbox": _boxes,
    "attention_mask": _ones,
    "decoder_attention_mask": _ones,
    "token_type_ids": _zeros,
    "position_ids": _zeros,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "spatial_shapes": _shapes,
    "pixel_attention_mask": _patch_mask,
    "pixel_mask": _patch_mask,
}
