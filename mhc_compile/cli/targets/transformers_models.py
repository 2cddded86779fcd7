"""`hf:MODEL_TYPE`: a tiny random model of transformers, with inputs that it runs with.

It is made from the config class alone; nothing is downloaded. For an architecture that needs more,
the error has a factory to paste and complete.
"""

from __future__ import annotations

import importlib
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mhc_compile.cli.error_handling import TargetError, near_names, one_line
from mhc_compile.cli.targets.example_inputs import guesses, needed, nested_configs
from mhc_compile.cli.targets.tiny_config import SCALES, Scale, fit_rotary_sections, shrink

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("mhc_compile.cli.targets")

#: Tasks in the order in which they are tried: MODEL_FOR_<task>_MAPPING of transformers.
_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ MASKED_LM CAUSAL_LM IMAGE_TEXT_TO_TEXT ZERO_SHOT_IMAGE_CLASSIFICATION"
    " IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION CTC AUDIO_CLASSIFICATION SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION"
    " DEPTH_ESTIMATION OBJECT_DETECTION TIME_SERIES_PREDICTION"
).split()
#: Parameters of a tiny model at most (a mild scale can leave billions), the least width of a scaled
#: one, and seconds of computing for trying sizes.
_MOST_PARAMETERS, _LEAST_WIDTH, _PATIENCE = 60_000_000, 24, 20.0


def load(
    model_type: str, settings: Mapping[str, Any], *, full_size: bool = False, memory: bool = False
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a model of `model_type` with example inputs, the same in every call.

    `settings` are fields of the config (`hidden_size`) or a nested one (`text_config.vocab_size`).

    Raises:
        TargetError: transformers is missing, the architecture or a field is unknown, or no model
            that runs could be made.
    """
    try:
        import transformers
    except ImportError:
        raise TargetError('hf: targets need transformers: pip install "mhc-compile[demo]"') from None
    transformers.logging.set_verbosity_error()
    if model_type not in transformers.CONFIG_MAPPING:
        near = near_names(model_type, transformers.CONFIG_MAPPING, 5) or "; transformers.CONFIG_MAPPING lists them"
        raise TargetError(f"transformers {transformers.__version__} knows no model type {model_type!r}{near}")
    kind = transformers.CONFIG_MAPPING[model_type]
    model: nn.Module | None = None
    try:
        config = kind()
        default, pinned = config.to_dict(), _pinned(config, settings, model_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not full_size:
                return _tiny(kind, default, pinned)
            with torch.device("cpu" if memory else "meta"):
                model = _build(_config(kind, default, Scale(), pinned))
            return model, (), next(guesses(model))
    except TargetError:
        raise
    except Exception as error:  # whatever the code of an architecture raises
        why, model = error.args if isinstance(error, _NotRunningError) else (one_line(error), model)
        raise TargetError(_explain(model_type, kind, why, model)) from error


class _NotRunningError(Exception):
    """No model that runs was made. The arguments are the reason and the last model, or None."""


def _tiny(kind: Any, default: dict[str, Any], pinned: dict[str, Any]) -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """Return the model at the smallest scale at which it can be built and runs."""
    reasons: list[str] = []
    model: nn.Module | None = None
    nested = [default, *(value for value in default.values() if isinstance(value, dict))]
    names = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
    width = next((f[name] for name in names for f in nested if type(f.get(name)) is int and name not in pinned), 1024)
    started = time.thread_time()
    for scale in SCALES:
        if scale.heads * scale.head > 1 and width // (scale.heads * scale.head) < _LEAST_WIDTH:
            continue
        try:
            model = _affordable(_config(kind, default, scale, pinned))
            return model, (), _inputs(model)
        except ImportError:  # a package that this architecture needs
            raise
        except Exception as error:  # whatever a config of these sizes does not fit: the next may
            reasons.append(one_line(error))
        if time.thread_time() - started > _PATIENCE:
            break
    most = max(set(reasons), key=reasons.count)
    raise _NotRunningError(f"at none of {len(reasons)} sizes did it run; most often because of: {most}", model)


def _pinned(config: Any, settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return {"text_config.hidden_size": 64} as {"text_config": {"hidden_size": 64}}."""
    pinned: dict[str, Any] = {}
    for path, value in settings.items():
        place, here = config, pinned
        *parents, name = path.split(".")
        for parent in parents:
            fields = {**place.to_dict(), **dict.fromkeys(type(place).attribute_map)}
            place, here = getattr(place, parent, None), here.setdefault(parent, {})
            if not hasattr(place, "to_dict"):
                near = near_names(parent, fields, 5)
                raise TargetError(f"--set {path}: the config of {model_type} has no such nested config{near}")
        known = {**{field: field for field in place.to_dict()}, **type(place).attribute_map}
        if name not in known:
            fields = place.to_dict()
            nested = [f"{key}.{name}" for key, value in fields.items() if isinstance(value, dict) and name in value]
            near = f"; near names: {', '.join(nested)}" if nested else near_names(name, known, 5)
            raise TargetError(f"--set {path}: the config of {model_type} has no such field{near}")
        here[known[name]] = value  # in the architecture's own name
    return pinned


def _config(kind: Any, default: dict[str, Any], scale: Scale, pinned: dict[str, Any]) -> Any:
    config = kind.from_dict(shrink(default, scale, pinned))
    for part in nested_configs(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        fit_rotary_sections(part)
    return config


def _affordable(config: Any) -> nn.Module:
    """Return the model, unless the meta device shows that it is large."""
    size = 0
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in _build(config).parameters())
    except Exception:  # some models read values while they are built
        log.debug("%s cannot be built on the meta device", type(config).__name__, exc_info=True)
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters would not be tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(config)


def _build(config: Any) -> nn.Module:
    """Return a model of the first class that accepts the config: of a task, or in its own file."""
    import transformers

    kind = type(config)
    mappings = [getattr(transformers, f"MODEL_FOR_{task}_MAPPING", {}) for task in _TASKS]
    found = [mapping[kind] for mapping in (*mappings, transformers.MODEL_MAPPING) if kind in mapping]
    classes = [one for entry in found for one in (entry if isinstance(entry, (tuple, list)) else (entry,))]
    if not found:  # a part of a larger model
        named = vars(importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))).items()
        own = [(name, entry) for name, entry in named if getattr(entry, "config_class", None) is kind]
        classes = [entry for name, entry in own if not name.endswith("PreTrainedModel")]
    errors: list[Exception] = []
    for model_class in classes:
        try:
            return model_class._from_config(config)  # type: ignore[no-any-return]
        except Exception as error:  # another class may accept it; else the first error is raised below
            errors.append(error)
    raise errors[0] if errors else ImportError(f"transformers has no model of a {kind.__name__} alone")


def _inputs(model: Any) -> dict[str, Any]:
    """Return inputs with which the model runs, in training mode or else in eval mode."""
    errors: list[Exception] = []
    for training in (True, False):
        for inputs in guesses(model.train(training)):
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    model(**inputs)
            except Exception as error:  # a wrong guess fails in any way; the first failure is reported
                errors.append(error)
            else:
                return inputs
    raise errors[0]


def _explain(model_type: str, config_class: Any, why: str, model: nn.Module | None) -> str:
    """Return the reason, and a factory to paste that is as complete as it can be."""
    config, home, names = config_class.__name__, config_class.__module__, ["input_ids"]
    module, kind = home.replace("configuration_", "modeling_"), "MODEL"
    if model is not None:
        module, kind, names = type(model).__module__, type(model).__name__, needed(model)
    ids = "torch.zeros(2, 16, dtype=torch.long)"
    inputs = ", ".join(f'"{name}": {ids if name.endswith("ids") else "..."}' for name in names)
    return (
        f"no tiny model of type {model_type!r} could be made: {why}. Write a factory, with sizes and inputs in the place"
        f" of the dots, and name it as models.py:build:\n\n"
        f"import torch\nfrom {home} import {config}\nfrom {module} import {kind}\n\n"
        f"def build():\n    return {kind}({config}(...)), (), {{{inputs}}}"
    )
