"""The class that makes a model of a transformers config: that of the first task that knows the architecture, or what its module defines."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["model_classes"]

#: Tasks in the order in which they are tried: MODEL_FOR_<task>_MAPPING of transformers.
_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "OBJECT_DETECTION",
    "TIME_SERIES_PREDICTION",
)


def model_classes(config: Any) -> Iterator[type]:
    """Classes that take this config, the most usual first. Nothing is built."""
    import transformers

    seen: set[type] = set()
    for name in [*(f"MODEL_FOR_{task}_MAPPING" for task in _TASKS), "MODEL_MAPPING"]:
        mapping: Any = getattr(transformers, name, {})
        if type(config) not in mapping:
            continue
        found = mapping[type(config)]
        for kind in found if isinstance(found, (tuple, list)) else (found,):
            if kind not in seen:
                seen.add(kind)
                yield kind
    if not seen:
        yield from _own(config)


def _own(config: Any) -> Iterator[type]:
    """The models in the module beside the config's that are made of it; parts of larger models are found in this way."""
    from transformers import PreTrainedModel

    home = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(home)
    except ImportError:
        return
    for name, kind in vars(module).items():
        if (
            inspect.isclass(kind)
            and issubclass(kind, PreTrainedModel)
            and kind.__module__ == home
            and not name.endswith("PreTrainedModel")
            and _made_of(kind, config)
        ):
            yield kind


def _made_of(kind: Any, config: Any) -> bool:
    named = inspect.signature(kind.__init__).parameters.get("config")
    said = named.annotation if named is not None else None
    return type(config).__name__ in {said, getattr(said, "__name__", None)} or kind.config_class is type(config)
