"""What a command line may name as a model: `package.module:factory`, `path/to/file.py:factory`, `hf:MODEL_TYPE`, `zoo:FAMILY`.

A factory takes no arguments and returns `(model, args)` or `(model, args, kwargs)`: the example inputs say how the model is called. Importing a
target runs its code: targets are trusted input.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.cli.trouble import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["Target", "TargetError", "load_target", "parse_settings"]


@dataclass(frozen=True)
class Target:
    """A model that a command line named, with example inputs: `model(*args, **kwargs)` is how it is called.

    Attributes:
        name: as it was written.
        model: a module, or an exported program.
        args: example inputs; those of a program are what it was exported with.
        kwargs: example inputs by name.
    """

    name: str
    model: nn.Module | ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def set_mode(self, train: bool) -> None:
        """Puts a module into training or eval mode. A program was exported in one of them and keeps it."""
        from torch import nn

        if isinstance(self.model, nn.Module):
            self.model.train(train)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("hidden_size=256", "act=gelu")` to a dict; values are Python literals where they parse as such, else strings.

    Raises:
        TargetError: an entry has no `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise TargetError(f"{pair!r} is no setting; expected NAME=VALUE")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def load_target(target: str, settings: Mapping[str, Any], *, full_size: bool = False) -> Target:  # noqa: ARG001
    """The model that `target` names, with example inputs.

    Args:
        target: see the module's docstring.
        settings: fields of the config of an `hf:` target, `layers` of a `zoo:` target.
        full_size: build an `hf:` target from its default config on the meta device instead of a tiny one with weights.

    Raises:
        TargetError: no such target; the message says what was tried and lists near names.
    """
    kind, colon, name = target.partition(":")
    if kind == "hf" and colon:
        return Target(target, *_transformers(name, settings))
    if kind == "zoo" and colon:
        return Target(target, *_zoo(name, settings))
    if settings:
        raise TargetError(f"--set is for hf: targets; {target!r} builds its model itself")
    file, _, factory = target.rpartition(":")
    if not file or not factory:
        raise TargetError(
            f"{target!r} is no target; expected package.module:factory, path/to/file.py:factory or hf:MODEL_TYPE (hf:gpt2)"
            " or zoo:FAMILY (zoo:resnet)"
        )
    return Target(target, *_call(_module(file), factory, target))


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise TargetError(f"there is no file {name!r} (looked in {os.getcwd()})")
        spec = importlib.util.spec_from_file_location(os.path.basename(name).removesuffix(".py"), name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TargetError(f"module {name!r} could not be imported: {error}") from error


def _call(module: ModuleType, factory: str, target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    from torch import nn

    make = getattr(module, factory, None)
    if make is None:
        near = difflib.get_close_matches(factory, dir(module), n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise TargetError(f"{module.__name__} has no {factory!r}{hint}")
    made = make()
    model, args, kwargs = (*made, {})[:3] if isinstance(made, tuple) and len(made) in {2, 3} else (made, None, None)
    if not isinstance(model, nn.Module) or not isinstance(args, tuple) or not isinstance(kwargs, dict):
        shown = tuple(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise TargetError(
            f"{target} returned {shown}; expected (model, args) or (model, args, kwargs), args a tuple of example inputs"
        )
    return model, args, kwargs


def _transformers(model_type: str, settings: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of a transformers architecture from its default config, on the meta device: no download, no memory."""
    import torch

    try:
        import transformers
    except ImportError:
        raise TargetError('hf: targets need transformers: pip install "mhc-compile[demo]"') from None
    transformers.logging.set_verbosity_error()
    known = list(transformers.CONFIG_MAPPING.keys())
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=5)
        raise TargetError(
            f"transformers {transformers.__version__} knows no model type {model_type!r}"
            + (f"; near names: {', '.join(near)}" if near else "")
        )
    config = transformers.AutoConfig.for_model(model_type, **settings)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.device("meta"):
        for head in ("AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModel"):
            try:
                model = getattr(transformers, head).from_config(config)
                break
            except ValueError:  # this head does not know the architecture
                continue
        else:
            raise TargetError(f"transformers cannot build a model of type {model_type!r} from its config alone")
        return model, (), _inputs(model, config)


def _zoo(name: str, settings: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A family of the zoo, of 2 layers or as many as `--set layers=N` says."""
    from mhc_compile import zoo

    layers = settings.get("layers", 2)
    unknown = sorted(set(settings) - {"layers"})
    if unknown or not isinstance(layers, int) or layers < 1:
        raise TargetError(f"zoo: targets have one setting, layers=N with N >= 1; found {dict(settings)}")
    return zoo.get(name).build(layers)


def _inputs(model: Any, config: Any) -> dict[str, Any]:
    import torch

    name = model.main_input_name
    if name == "input_ids":
        inputs = {name: torch.zeros(1, 64, dtype=torch.long)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.zeros(1, 64, dtype=torch.long)
        return inputs
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size)}
    raise TargetError(
        f"{type(model).__name__} takes {name!r}, for which no example input can be made; write a factory: path/to/file.py:factory"
    )
