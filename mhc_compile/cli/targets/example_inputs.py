"""Example inputs for a transformers model, guessed by the names in its `forward`."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_BATCH = 2
_LENGTH = 16
#: Ids at the end of a tiny vocabulary are special tokens.
_SPECIAL = 64
#: Combinations tried per choice of names.
_MOST = 12
#: Names with a default that some models need: a CLIP takes text and image.
_EXTRA = ("pixel_values", "input_ids", "input_features", "encoder_hidden_states")


def needed(model: Any) -> list[str]:
    """Return the names without a default in `forward`, the main input, and ids for a decoder."""
    parameters = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, entry in parameters.items() if entry.default is entry.empty and entry.kind in kinds]
    main = getattr(model, "main_input_name", "")
    if main in parameters and main not in names:
        names.insert(0, main)
    usual = ("input_ids", "pixel_values", "inputs_embeds", "hidden_states")
    names = names or [name for name in usual if name in parameters][:1]
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    return list(dict.fromkeys(names))


def guesses(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield keyword arguments to try, the most usual first.

    Raises:
        ValueError: `forward` needs an input for which there is no example.
    """
    names = needed(model)
    configs = list(nested_configs(model.config))
    parameters = inspect.signature(model.forward).parameters
    extra = [name for name in _EXTRA if name in parameters and name not in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for added in ((), *((name,) for name in extra), *itertools.combinations(extra, 2)):
            choices = [_candidates(name, configs) for name in (*names, *added)]
            for chosen in itertools.islice(itertools.product(*choices), _MOST):
                yield dict(zip((*names, *added), chosen, strict=True))


def nested_configs(config: Any) -> Iterator[Any]:
    """Yield the config and those nested in it."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


def _candidates(name: str, configs: list[Any]) -> list[Tensor]:
    """Return guesses for one input, with sizes from the first config that has them."""

    def find(*fields: str, default: Any) -> Any:
        values = (getattr(config, field, None) for config in configs for field in fields)
        return next((value for value in values if value is not None), default)

    def size(*fields: str, default: int) -> int:
        value = find(*fields, default=default)
        return int(value[-1] if isinstance(value, (list, tuple)) and value else value if value else default)

    mel = size("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_dim", "mel_bins", default=80)
    history = size("context_length", "prediction_length", default=8) + max(
        find("lags_sequence", default=[0]), default=0
    )
    match name:
        case "input_ids" | "decoder_input_ids" | "text_input_ids" | "inputs" | "labels":
            vocabulary = size("vocab_size", "encoder_vocab_size", default=64)
            known = vocabulary - _SPECIAL if vocabulary > 2 * _SPECIAL else vocabulary // 2
            ids = 3 + torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) * 7 % max(known - 3, 1)
            ids = ids.clamp(max=max(vocabulary - 1, 0))
            books = size("num_codebooks", "n_codebooks", default=4)
            return [ids, *(ids[..., None].expand(-1, -1, count) for count in (books, books + 1)), ids[:1]]
        case "attention_mask" | "decoder_attention_mask":
            return [torch.ones(_BATCH, _LENGTH, dtype=torch.long)]
        case "token_type_ids" | "position_ids":
            return [torch.zeros(_BATCH, _LENGTH, dtype=torch.long)]
        case "pixel_values" | "pixel_values_videos" | "images":
            image = find("image_size", "img_size", "input_size", default=64)
            image = (image["height"], image["width"]) if isinstance(image, dict) else image
            sides = (image, image) if isinstance(image, int) else (*image, *image)[-2:]
            channels = size("num_channels", "in_channels", "in_chans", default=3)
            patch = channels * size("patch_size", "spatial_patch_size", default=16) ** 2
            frames = find("num_frames", "frames_per_clip", "num_image_frames", default=0)
            shapes = [(1, frames, channels, *sides)] if isinstance(frames, int) and frames else []
            shapes += [(_BATCH, channels, *sides), (_BATCH, 16, patch), (_BATCH, channels, 224, 224)]
            shapes += [(_BATCH, 1, *sides), (_BATCH, 1, channels, *sides), (1, 2, channels, *sides)]
        case "input_features" | "audio_features":
            longest = size("max_source_positions", "max_length", "n_window", default=32)
            shapes = [(_BATCH, mel, 2 * longest), (_BATCH, 64, mel), (_BATCH, 160, mel), (_BATCH, mel, 64)]
            shapes += [(_BATCH, 1, 4 * size("spec_size", default=256), mel)]
        case "input_values" | "audio_values":
            shapes = [(_BATCH, size("max_length", default=256), mel)] if find("frequency_stride", default=None) else []
            shapes += [(_BATCH, 6400), (_BATCH, size("audio_channels", "in_channels", default=1), 6400)]
        case "past_values" if find("lags_sequence", default=None) is None:
            shapes = [(_BATCH, history, size("num_input_channels", "input_size", default=1)), (_BATCH, history)]
        case "past_values" | "past_observed_mask":
            shapes = [(_BATCH, history)]
        case "past_time_features":
            shapes = [(_BATCH, history, size("num_time_features", default=0))]
        case "hidden_states" | "inputs_embeds" | "query_embeds" | "encoder_hidden_states":
            shapes = [(_BATCH, _LENGTH, size("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim", default=32))]
        case _:
            raise ValueError(f"forward takes {name!r}, for which there is no example")
    # A mask of observed values is all ones.
    return [torch.ones(shape) if name == "past_observed_mask" else torch.randn(shape) for shape in shapes]
