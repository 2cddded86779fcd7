"""The class that makes a model of a transformers config: that of the first task that knows the architecture, or what its module defines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

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
    """The models in the modules beside the config's that are made of it; parts of larger models are found in this way."""
    from transformers import PreTrainedModel

    for module in _modules(type(config).__module__):
        for name, kind in vars(module).items():
            if (
                inspect.isclass(kind)
                and issubclass(kind, PreTrainedModel)
                and kind.__module__ == module.__name__
                and not name.endswith("PreTrainedModel")
                and "forward" in vars(kind)
                and _made_of(kind, config)
            ):
                yield kind


def _modules(configuration: str) -> Iterator[ModuleType]:
    """The modeling files of the package of a configuration file, the one of the same name first."""
    package, _, name = configuration.rpartition(".")
    first = name.replace("configuration_", "modeling_")
    places = getattr(importlib.import_module(package), "__path__", [])
    others = sorted(entry.name for entry in pkgutil.iter_modules(places) if entry.name.startswith("modeling_"))
    for found in dict.fromkeys([first, *others]):
        try:
            yield importlib.import_module(f"{package}.{found}")
        except ImportError:
            continue


def _made_of(kind: Any, config: Any) -> bool:
    named = inspect.signature(kind.__init__).parameters.get("config")
    said = named.annotation if named is not None else None
    return type(config).__name__ in {said, getattr(said, "__name__", None)} or kind.config_class is type(config)
