"""A tiny config of a transformers architecture: the default, scaled by the names of its fields.

Nothing is known of single architectures. Sizes are divided, not set, so that relations between them
hold: a width is heads times head size before and after. If the model does not run at one `Scale`,
the caller tries the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How much smaller than the default; None keeps the sizes of a kind."""

    heads: int = 1  # divides numbers of heads
    head: int = 1  # divides sizes of heads. Widths are divided by both.
    layers: int | None = None  # of every stack
    vocabulary: int | None = None  # tokens of every larger vocabulary
    image: int = 1  # divides the sizes of images


_TOKENS = 512
#: Smallest first. The later ones keep a kind of size that other fields may depend on.
SCALES = (
    *(Scale(heads, head, 2, _TOKENS, 2) for heads, head in ((8, 8), (4, 8), (4, 4), (2, 8), (1, 16), (2, 4), (1, 8))),
    *(Scale(heads, head, 2, _TOKENS) for heads, head in ((4, 4), (1, 8))),
    *(Scale(heads, head, 4, _TOKENS) for heads, head in ((4, 4), (1, 8))),
    *(Scale(4, 4, 2), Scale(4, 4, None, _TOKENS), Scale(1, 4)),
    *(Scale(1, 1, 2, _TOKENS, 2), Scale(1, 1, 2), Scale()),
)

_CHOSEN = r"experts?_per_tok|moe_top_?k|^top_k_experts|num_experts_per|moe_k$|expert_top_k"
_POSITIONS = r"^max_position|^n_positions$|^n_ctx$|^max_seq|^seq_length$|^max_sequence|^context_length$"
_HEAD = r"head_dim|head_size|dim_head|d_head|^d_kv$|kv_channels|rotary_dim|mrope_section|key_dim$|value_dim$"
#: Integers that are no width, and their new values: the first pattern that matches counts.
_RULES: tuple[tuple[str, Callable[[int, Scale], int]], ...] = (
    (r"^(n_group|topk_group|num_expert_groups?)$", lambda v, _: min(v, 1)),
    (r"(^|_)(experts|num_experts|num_local_experts)$", lambda v, _: min(v, 4)),
    (_CHOSEN, lambda v, _: min(v, 2)),
    (_POSITIONS, lambda v, _: min(v, _TOKENS)),
    (r"^(image_size|img_size|input_image_size)$", lambda v, s: v if v <= 64 or v % s.image else v // s.image),
    (r"heads?$|^multi_query_group_num$|^num_head_groups$", lambda v, s: max(v // s.heads, 1)),
    (_HEAD, lambda v, s: v if v % s.head else v // s.head),
)
_WIDTH = re.compile(
    r"hidden|intermediate|embd?|embed|ffn|mlp_dim|d_model|d_ff|d_inner|^dim$|_dims?$|dims$|width|channels|_rank$|inner|"
    r"projection_size|feed_?forward|expand_size|conv_dim|latent|bottleneck|_size$|sizes$|filters"
)
_NO_WIDTH = re.compile(
    r"image|patch|vocab|kernel|window|num_channels|in_chan|input_channels|pool|position|token|chunk|stride|length|^num_|groups?|"
    r"^max_|^min_|layers|crop|codebook|grid|ratio|block_size|stage|batch|frame|time|bucket|sampl|n_fft|mel|norm|expand$|input_size|"
    r"feature_size|context|factor|_per_|query_size|audio|spec_|label|point|std|temporal"
)
_SMALLEST_WIDTH = 16
_LAYERS = re.compile(r"(^|_)(layers?|depth|blocks)$")
_NO_LAYERS = re.compile(
    r"feat_extract|conv|adapter|shared|dense|num_feature_levels|start|skip|postnet|use_|add_|norm|return|tie_|first|full|drop"
)
_DEPTHS = re.compile(r"depths$|(^|_)(num_blocks|layers|num_layers|blocks|repeats)$")
_TOKEN = re.compile(r"token_(id|index)s?$|_token$|^(image|video|audio)_(id|index)$|decoder_start|_id$")
#: Ids at the end of a tiny vocabulary, for special tokens.
_SPECIAL = 64
_INDICES = re.compile(r"index(es)?$|indices$|indexes$|_layer_idx|layer_ids$")
#: Fields that transformers computes from others.
_DERIVED = frozenset({"out_features", "out_indices", "stage_names", "transformers_version", "_name_or_path"})
#: Sizes without a default in some architectures.
_MISSING = {r"^vocab_size$": 64, r"^(pad|mask)_token_id$": 1, r"^prediction_length$": 8, _CHOSEN: 2}


def shrink(config: Mapping[str, Any], scale: Scale, pinned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a smaller config, and of those nested in it; `pinned` ones as given."""
    keep_layers = scale.layers is None and not any(_is_depth(name, value) for name, value in pinned.items())
    depths = {value for name, value in config.items() if _is_depth(name, value)}
    layers = _layers(config, scale, pinned)
    result: dict[str, Any] = {}
    for name, value in config.items():
        listed = isinstance(value, (list, tuple))
        if isinstance(value, Mapping) and name.startswith("rope"):
            result[name] = {key: _scaled(key, entry, scale) for key, entry in value.items()}
        elif isinstance(value, Mapping):
            nested = name.endswith("config") or name in {"encoder", "decoder", "generator", "discriminator"}
            result[name] = shrink(value, scale, pinned.get(name, {})) if nested else value
        elif name in pinned:
            result[name] = pinned[name]
        elif name in _DERIVED and scale != Scale():
            continue
        elif keep_layers:
            result[name] = _scaled(name, value, scale)
        elif _is_depth(name, value):
            result[name] = layers
        elif listed and len(value) in depths and (len(value) > 5 or not _WIDTH.search(name)):
            result[name] = [_scaled(name, entry, scale) for entry in _resized(value, layers)]
        elif listed and _INDICES.search(name) and all(isinstance(entry, int) for entry in value):
            result[name] = list(dict.fromkeys(min(entry, layers - 1) for entry in value))
        else:
            result[name] = _scaled(name, value, scale)
    return result | {name: value for name, value in pinned.items() if name not in config}


def _layers(config: Mapping[str, Any], scale: Scale, pinned: Mapping[str, Any]) -> int:
    """Return the pinned depth, else the least that has a layer of each type."""
    asked = [value for name, value in pinned.items() if _is_depth(name, value)]
    if asked:
        return int(asked[0])
    kinds = [len(set(value)) for value in config.values() if isinstance(value, list) and _are_names(value)]
    few = scale.layers or 2
    depths = [value for name, value in config.items() if _is_depth(name, value)]
    return min(max([few, *(kind for kind in kinds if kind <= 4)]), max(depths, default=few))


def _scaled(name: str, value: Any, scale: Scale) -> Any:
    """Return the value of one field at `scale`."""
    if isinstance(value, (list, tuple)):
        if _DEPTHS.search(name) and scale.layers is not None and all(type(entry) is int for entry in value):
            return [min(entry, 2) for entry in value]
        return [_scaled(name, entry, scale) for entry in value]
    if value is None and scale != Scale():
        return next((size for pattern, size in _MISSING.items() if re.search(pattern, name)), None)
    if type(value) is not int or scale == Scale():
        return value
    if _TOKEN.search(name):
        # The same in all nested configs, and different for tokens with ids next to each other.
        last = scale.vocabulary
        return value if last is None or value < last - _SPECIAL else last - 1 - value % _SPECIAL
    if name.endswith("vocab_size") or name.startswith("vocab_size"):
        return min(value, scale.vocabulary or value)
    for pattern, rule in _RULES:
        if re.search(pattern, name):
            return rule(value, scale)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= _SMALLEST_WIDTH:
        factor = scale.heads * scale.head
        return max(value // factor if value % factor == 0 else 4 * round(value / factor / 4), 4)
    return value


def _is_depth(name: str, value: Any) -> bool:
    return type(value) is int and value > 1 and bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name)


def _are_names(value: list[Any] | tuple[Any, ...]) -> bool:
    return bool(value) and all(isinstance(entry, str) for entry in value)


def _resized(value: list[Any] | tuple[Any, ...], length: int) -> list[Any]:
    """Return `length` entries, repeated from the start, with each of the names if there is room."""
    start = list(value[:length])
    names = list(dict.fromkeys(value)) if _are_names(value) else []
    if len(set(start)) < len(names) <= length:
        start = [*names, *start][:length]
    return [start[index % len(start)] for index in range(length)] if start else start


def fit_rotary_sections(config: Any) -> None:
    """Make the rotary sections of text, height and width fill half a head, whatever its size."""
    rope = getattr(config, "rope_parameters", None)
    if "mrope_section" not in getattr(type(config), "ignore_keys_at_rope_validation", ()) or not isinstance(rope, dict):
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(size * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)) // 2
    if sum(rope.get("mrope_section", ())) != half:
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
