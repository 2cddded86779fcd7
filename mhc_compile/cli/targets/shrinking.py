"""A tiny config of any transformers architecture: the default one, every width, depth and vocabulary of it scaled down by its name.

Nothing is known of single architectures. Sizes are divided, not set, so that what held between them holds still: a width is heads times head size
before and after. Where that does not give a model that runs, a gentler `Scale` is tried (see `transformers_models`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SCALES", "Scale", "shrink", "tiny_vocabulary"]


@dataclass(frozen=True)
class Scale:
    """How much smaller. None leaves the sizes of a kind as they are.

    Attributes:
        heads: divides numbers of heads.
        head: divides sizes of heads. Widths are divided by both.
        layers: of every stack.
        vocabulary: tokens of every vocabulary that is larger.
        image: divides the sizes of images.
    """

    heads: int = 1
    head: int = 1
    layers: int | None = None
    vocabulary: int | None = None
    image: int = 1


_TOKENS = 512
#: The steps of the ladder, the smallest first. The last ones keep one kind of size: positions of stages, token ids and windows may depend on it.
SCALES = (
    *(
        Scale(heads, head, 2, _TOKENS, 2)
        for heads, head in ((8, 8), (4, 8), (4, 4), (2, 8), (1, 16), (2, 4), (1, 8), (1, 4))
    ),
    Scale(4, 4, 2, _TOKENS),
    Scale(1, 8, 2, _TOKENS),
    Scale(4, 4, 2),
    Scale(1, 8, 2),
    Scale(4, 4, 4, _TOKENS),
    Scale(1, 8, 4, _TOKENS),
    Scale(2, 2, 2, _TOKENS),
    Scale(4, 4, None, _TOKENS),
    Scale(1, 4, None),
    Scale(1, 1, 2, _TOKENS, 2),
    Scale(1, 1, 2, _TOKENS),
    Scale(1, 1, 2),
    Scale(1, 1, 4),
    Scale(),
)
_SMALLEST = 16

_HEADS = re.compile(r"heads?$|^multi_query_group_num$|^num_head_groups$")
_HEAD = re.compile(
    r"head_dim|head_size|dim_head|d_head|^d_kv$|kv_channels|rotary_dim|mrope_section|key_dim$|value_dim$"
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
_LAYERS = re.compile(r"(^|_)(layers?|depth|blocks)$")
_NO_LAYERS = re.compile(
    r"feat_extract|conv|adapter|shared|dense|num_feature_levels|start|skip|postnet|use_|add_|norm|return|tie_|first|full|drop"
)
_DEPTHS = re.compile(r"depths$|(^|_)(num_blocks|layers|num_layers|blocks|repeats)$")
_POSITIONS = re.compile(r"^max_position|^n_positions$|^n_ctx$|^max_seq|^seq_length$|^max_sequence|^context_length$")
_EXPERTS = re.compile(r"(^|_)(experts|num_experts|num_local_experts)$")
_CHOSEN = re.compile(r"experts?_per_tok|moe_top_?k|^top_k_experts|num_experts_per|moe_k$|expert_top_k")
_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_groups?)$")
_TOKEN = re.compile(r"token_(id|index)s?$|_token$|^(image|video|audio)_(id|index)$|decoder_start|_id$")
_INDICES = re.compile(r"index(es)?$|indices$|indexes$|_layer_idx|layer_ids$")
_DERIVED = frozenset({"out_features", "out_indices", "stage_names", "transformers_version", "_name_or_path"})
_FEWEST_TOKENS = 64
#: Sizes that some architectures leave to whoever makes a config.
_MISSING = {r"^vocab_size$": 64, r"^(pad|mask)_token_id$": 1, r"^prediction_length$": 8, _CHOSEN.pattern: 2}


def tiny_vocabulary(size: int, scale: Scale) -> int:
    """The size of a vocabulary that has `size` tokens, in a config scaled by `scale`."""
    return size if scale.vocabulary is None else min(size, scale.vocabulary)


def shrink(config: Mapping[str, Any], scale: Scale, pinned: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a smaller config, those of nested ones as well.

    Args:
        config: what `to_dict()` of a config gave.
        scale: how much smaller.
        pinned: fields that have these values whatever the scale says; those of nested configs as dicts.
    """
    return _Shrinker(scale).shrink(config, pinned)


class _Shrinker:
    """Ids of special tokens are the same ones in the nested configs: they are given out once."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._ids: dict[int, int] = {}

    def shrink(self, config: Mapping[str, Any], pinned: Mapping[str, Any]) -> dict[str, Any]:
        deep = self.scale.layers is None and not any(_is_depth(name, value) for name, value in pinned.items())
        result: dict[str, Any] = {}
        before = {value for name, value in config.items() if _is_depth(name, value)}
        layers = self._layers(config, pinned)
        for name, value in config.items():
            nested = pinned.get(name)
            if name == "per_layer_config" and isinstance(value, Mapping) and not deep:
                result[name] = {key: entry for key, entry in value.items() if int(key) < layers}
            elif isinstance(value, Mapping):
                result[name] = (
                    self.shrink(value, nested if isinstance(nested, Mapping) else {}) if _is_config(name) else value
                )
                if name.startswith("rope"):
                    result[name] = {key: self._scaled(key, entry) for key, entry in value.items()}
            elif name in pinned:
                result[name] = nested
            elif name in _DERIVED and self.scale != Scale():
                continue
            elif deep:
                result[name] = self._scaled(name, value)
            elif _is_depth(name, value):
                result[name] = layers
            elif (
                isinstance(value, (list, tuple))
                and len(value) in before
                and (len(value) > 5 or not _WIDTH.search(name))
            ):
                result[name] = [self._scaled(name, entry) for entry in _cycled(value, layers)]
            elif (
                isinstance(value, (list, tuple))
                and _INDICES.search(name)
                and all(isinstance(entry, int) for entry in value)
            ):
                result[name] = list(dict.fromkeys(min(entry, layers - 1) for entry in value))
            else:
                result[name] = self._scaled(name, value)
        if self.scale != Scale():
            _complete_heads(result)
        return result | {name: value for name, value in pinned.items() if name not in config}

    def _layers(self, config: Mapping[str, Any], pinned: Mapping[str, Any]) -> int:
        """As many as asked for, and as many as it takes to have a layer of each type."""
        asked = [value for name, value in pinned.items() if _is_depth(name, value)]
        if asked:
            return int(asked[0])
        kinds = [len(set(value)) for value in config.values() if isinstance(value, list) and _are_names(value)]
        depths = [value for name, value in config.items() if _is_depth(name, value)]
        few = self.scale.layers or 2
        return min(max([few, *(kind for kind in kinds if kind <= 4)]), max(depths, default=few))

    def _scaled(self, name: str, value: Any) -> Any:
        scale = self.scale
        if isinstance(value, (list, tuple)):
            if _DEPTHS.search(name) and scale.layers is not None and all(type(entry) is int for entry in value):
                return [min(entry, 2) for entry in value]
            return [self._scaled(name, entry) for entry in value]
        if value is None and scale != Scale():
            return next((size for kind, size in _MISSING.items() if re.search(kind, name)), None)
        if type(value) is not int:
            return value
        if _TOKEN.search(name):
            return self._token(value)
        if name.endswith("vocab_size") or name.startswith("vocab_size"):
            return tiny_vocabulary(value, scale)
        if scale == Scale():
            return value
        if _GROUPS.search(name):
            return 1
        if _EXPERTS.search(name):
            return min(value, 4)
        if _CHOSEN.search(name):
            return min(value, 2)
        if _POSITIONS.search(name):
            return min(value, _TOKENS)
        if name in {"image_size", "img_size", "input_image_size"} and value % scale.image == 0 and value > 64:
            return value // scale.image
        if _HEADS.search(name):
            return max(value // scale.heads, 1)
        if _HEAD.search(name):
            return value // scale.head if value % scale.head == 0 else value
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= _SMALLEST:
            factor = scale.heads * scale.head
            return max(value // factor if value % factor == 0 else 4 * round(value / factor / 4), 4)
        return value

    def _token(self, value: int) -> int:
        most = self.scale.vocabulary
        if most is None or value < most - _FEWEST_TOKENS:
            return value
        return self._ids.setdefault(value, most - 1 - len(self._ids))


def _complete_heads(config: dict[str, Any]) -> None:
    """Some models ask for what their configs leave open."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if type(heads) is int and "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if type(heads) is int and type(width) is int and "head_dim" in config and config["head_dim"] is None:
        config["head_dim"] = max(width // heads, 2)


def _is_config(name: str) -> bool:
    return name.endswith("config") or name in {"encoder", "decoder", "generator", "discriminator"}


def _is_depth(name: str, value: Any) -> bool:
    return type(value) is int and value > 1 and bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name)


def _are_names(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(entry, str) for entry in value)


def _cycled(value: list[Any] | tuple[Any, ...], length: int) -> list[Any]:
    """The first entries; of a list of names, each name at least once if there is room."""
    start = list(value[:length])
    names = list(dict.fromkeys(value)) if _are_names(list(value)) else []
    if len(set(start)) < len(names) <= length if names else False:
        start = [*names, *start][:length]
    return start + [start[index % len(start)] for index in range(length - len(start))] if start else start
