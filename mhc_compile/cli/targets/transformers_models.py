"""`hf:MODEL_TYPE`: a tiny random model of any architecture of transformers, from its config class alone, with inputs that it runs with."""

from __future__ import annotations

import difflib
import time
import warnings
from typing import TYPE_CHECKING, Any

from mhc_compile.cli.error_handling import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["load"]

#: Parameters of a model that still counts as tiny; a gentle scale can leave billions of them.
_MOST_PARAMETERS = 60_000_000
#: Narrower than this a model is divided no further.
_LEAST_WIDTH = 24
#: Seconds for which sizes are tried.
_PATIENCE = 20.0


def load(
    model_type: str, settings: Mapping[str, Any], *, full_size: bool = False, memory: bool = False
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of `model_type` with example inputs; every call gives the same numbers. Nothing is downloaded.

    Args:
        model_type: a key of `transformers.CONFIG_MAPPING`.
        settings: fields of the config, `hidden_size`, or of one nested in it, `text_config.hidden_size`.
        full_size: the default config, on the meta device, instead of the smallest one that the architecture runs with.
        memory: the default config, and not on the meta device.

    Raises:
        TargetError: transformers is missing, the architecture or a field is unknown, or no model that runs could be made.
    """
    try:
        import transformers
    except ImportError:
        raise TargetError('hf: targets need transformers: pip install "mhc-compile[demo]"') from None
    transformers.logging.set_verbosity_error()
    kind = _config_class(model_type)
    try:
        default = kind().to_dict()
    except Exception as error:
        raise _hopeless(model_type, f"its config has no defaults ({_line(error)})") from error
    pinned = _nested(kind(), settings, model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if full_size:
            return _full_size(model_type, kind, default, pinned, "cpu" if memory else "meta")
        return _tiny(model_type, kind, default, pinned)


def _config_class(model_type: str) -> Any:
    import transformers

    known = list(transformers.CONFIG_MAPPING.keys())
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=5) or [name for name in known if model_type in name][:5]
        raise TargetError(
            f"transformers {transformers.__version__} knows no model type {model_type!r}"
            + (f"; near names: {', '.join(near)}" if near else "; transformers.CONFIG_MAPPING lists them")
        )
    return transformers.CONFIG_MAPPING[model_type]


def _nested(config: Any, settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """`{"text_config.hidden_size": 64}` as `{"text_config": {"hidden_size": 64}}`, in the architecture's own words."""
    pinned: dict[str, Any] = {}
    for path, value in settings.items():
        place, here = config, pinned
        said: list[str] = []
        *parents, name = path.split(".")
        for parent in parents:
            place, said = getattr(place, parent, None), [*said, parent]
            if not hasattr(place, "to_dict"):
                raise _unknown(config, ".".join(said), model_type, "nested config")
            here = here.setdefault(parent, {})
        known = {**{entry: entry for entry in place.to_dict()}, **type(place).attribute_map}
        if name not in known:
            raise _unknown(place, path, model_type, "field")
        here[known[name]] = value
    return pinned


def _unknown(config: Any, path: str, model_type: str, what: str) -> TargetError:
    prefix, _, name = path.rpartition(".")
    fields = {**config.to_dict(), **dict.fromkeys(type(config).attribute_map)} if hasattr(config, "to_dict") else {}
    nested = [f"{key}.{name}" for key, value in fields.items() if isinstance(value, dict) and name in value]
    near = nested or difflib.get_close_matches(name, fields, n=5)
    shown = [f"{prefix}.{entry}" if prefix and not nested else entry for entry in near]
    hint = f"; near names: {', '.join(shown)}" if near else ""
    return TargetError(f"--set {path}: the config of {model_type} has no such {what}{hint}")


def _full_size(
    model_type: str, kind: Any, default: dict[str, Any], pinned: dict[str, Any], device: str
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    import torch

    from mhc_compile.cli.targets.example_inputs import guesses
    from mhc_compile.cli.targets.shrinking import Scale

    config = _config(kind, default, Scale(), pinned)
    with torch.device(device):
        model = _build(model_type, config)
    return model, (), next(guesses(model))


def _tiny(
    model_type: str, kind: Any, default: dict[str, Any], pinned: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The smallest scale at which the model can be built and runs."""
    from mhc_compile.cli.targets.shrinking import SCALES

    reasons: list[str] = []
    started = time.monotonic()
    width = _width(default, pinned)
    for scale in SCALES:
        if scale.heads * scale.head > 1 and width // (scale.heads * scale.head) < _LEAST_WIDTH:
            continue
        try:
            model = _affordable(model_type, _config(kind, default, scale, pinned))
            return model, (), _inputs(model)
        except TargetError:
            raise
        except ImportError as error:  # a package that this architecture needs
            raise _hopeless(model_type, _line(error)) from error
        except Exception as error:  # whatever a config of these sizes does not fit
            reasons.append(_line(error))
        if time.monotonic() - started > _PATIENCE:
            break
    told = max(set(reasons), key=reasons.count)
    raise _hopeless(model_type, f"at none of {len(reasons)} sizes did a random one run; most often because of: {told}")


def _width(default: Mapping[str, Any], pinned: Mapping[str, Any]) -> int:
    """The width of the default model, as far as its config tells."""
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim"):
        for fields in (default, *(value for value in default.values() if isinstance(value, dict))):
            if type(fields.get(name)) is int and name not in pinned:
                return int(fields[name])
    return 1024


def _config(kind: Any, default: dict[str, Any], scale: Any, pinned: dict[str, Any]) -> Any:
    from mhc_compile.cli.targets.example_inputs import nested_configs
    from mhc_compile.cli.targets.shrinking import shrink

    config = kind.from_dict(shrink(default, scale, pinned))
    for part in nested_configs(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        _fit_sections(part)
    return config


def _fit_sections(config: Any) -> None:
    """Rotary embeddings of text, height and width share out the size of a head: the defaults in the models' code are those of large heads."""
    rope = getattr(config, "rope_parameters", None)
    if "mrope_section" not in getattr(type(config), "ignore_keys_at_rope_validation", ()) or not isinstance(rope, dict):
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(size * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)) // 2
    if sum(rope.get("mrope_section", ())) != half:
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _affordable(model_type: str, config: Any) -> nn.Module:
    """The model, unless it is a large one. It is counted on the meta device first."""
    import torch

    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in _build(model_type, config).parameters())
    except TargetError:
        raise
    except Exception:  # some models compute with numbers while they are built
        size = 0
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters would not be tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(model_type, config)


def _build(model_type: str, config: Any) -> nn.Module:
    from mhc_compile.cli.targets.model_classes import model_classes

    first: Exception | None = None
    for kind in model_classes(config):
        try:
            return kind._from_config(config)  # type: ignore[attr-defined, no-any-return]
        except Exception as error:
            first = first or error
    if first is None:
        raise _hopeless(model_type, "transformers has no model that is built from this config alone")
    raise first


def _inputs(model: Any) -> dict[str, Any]:
    """Inputs with which it runs, in training mode or else in eval mode."""
    import torch

    from mhc_compile.cli.targets.example_inputs import guesses

    first: Exception | None = None
    try:
        for training in (True, False):
            for inputs in guesses(model.train(training)):
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        model(**inputs)
                except Exception as error:
                    first = first or error
                else:
                    return inputs
    except KeyError as error:
        raise ValueError(f"{type(model).__name__}.forward takes {error}, for which mhc has no example") from error
    assert first is not None
    raise first


def _hopeless(model_type: str, why: str) -> TargetError:
    return TargetError(
        f"no tiny model of type {model_type!r} could be made: {why}. Write a factory that returns the model and its inputs, and name it as"
        " path/to/file.py:factory"
    )


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__
