"""`--weights FILE`: load a checkpoint into the model of a target.

Nothing but tensors is read from it, so a file of unknown origin is safe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.attachment.model_tree import plain_name
from mhc_compile.checkpoints.load import load_state_dict
from mhc_compile.checkpoints.reader import split_entry
from mhc_compile.checkpoints.restore import restore
from mhc_compile.cli.error_handling import WeightsError, one_line, require_file

if TYPE_CHECKING:
    from mhc_compile.cli.targets import Target

#: Keys under which trainers save the state dict of the model.
_KEYS = ("state_dict", "model", "model_state_dict", "module")
_SHOWN = 3


def load_weights(target: Target, path: str) -> None:
    """Load a checkpoint into the model of `target`, and attach the hyper-connections that it has.

    It is a `.safetensors` file, or `torch.save` of a state dict or of a dict with one.

    Raises:
        TargetError: there is no such file.
        WeightsError: the file has more than tensors, the model is an exported program, or names or
            shapes are not those of the model.
    """
    if not isinstance(target.model, nn.Module):
        raise WeightsError(
            f"--weights {path}: {target.name} is an exported program, which has its weights in it; leave out --weights"
        )
    state = {plain_name(name): value for name, value in _read(path).items()}
    if any(map(split_entry, state)):
        restore(target.model, state)
    _compare(target.model, state, path, target.name)
    load_state_dict(target.model, state, strict=False)


def _read(path: str) -> Mapping[str, Tensor]:
    require_file(path, "--weights: ")
    if path.endswith(".safetensors"):
        return _safetensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader meets
        rejected = re.search(r"GLOBAL ([\w.]+)", str(error))
        if rejected is None:
            raise WeightsError(
                f"--weights {path}: no checkpoint that torch.load can read ({one_line(error)})"
            ) from error
        raise WeightsError(
            f"--weights {path}: the file holds Python objects that are no tensors ({rejected[1]}), which could run code"
            " when they are loaded; it was not read. Save the tensors alone: torch.save(model.state_dict(), path), or as"
            " safetensors"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    entries = list(content.values()) if isinstance(content, Mapping) else []
    if not entries or not all(isinstance(value, torch.Tensor) for value in entries):
        kind = type(content).__name__
        keys = f" with {', '.join(map(repr, list(content)[:_SHOWN]))}" if isinstance(content, Mapping) else ""
        raise WeightsError(
            f"--weights {path}: found a {kind}{keys}; expected a state dict, or a dict with one under"
            f" {' or '.join(_KEYS[:2])}"
        )
    return dict(content)


def _safetensors(path: str) -> Mapping[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise WeightsError(f"--weights {path}: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # the library's own error class is private
        raise WeightsError(f"--weights {path}: no safetensors file ({one_line(error)})") from error


def _compare(model: nn.Module, state: Mapping[str, Tensor], path: str, target: str) -> None:
    """Raise WeightsError unless names and shapes are the model's, of tied parameters one name."""
    wanted = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    loaded = {id(value) for name, value in wanted.items() if name in state}
    missing = [name for name, value in wanted.items() if name not in state and id(value) not in loaded]
    if not any(map(split_entry, state)):
        missing = [name for name in missing if split_entry(name) is None]
    shapes = [
        f"{name} is {list(state[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in wanted.items()
        if name in state and getattr(value, "shape", None) != state[name].shape
    ]
    unexpected = [name for name in state if name not in wanted]
    parts = [
        f"{len(unexpected)} entries of the file are not in the model ({_first(unexpected)})" if unexpected else "",
        f"{len(missing)} of the model are not in the file ({_first(missing)})" if missing else "",
        f"{len(shapes)} with other shapes: {_first(shapes, '; ')}" if shapes else "",
    ]
    if any(parts):
        text = f"--weights {path} does not fit {target} ({type(model).__name__}): {', and '.join(filter(None, parts))}."
        if target.startswith("hf:"):
            text += " An hf: target is tiny unless --full-size or --set gives it the sizes of the checkpoint"
        raise WeightsError(text)


def _first(entries: list[str], between: str = ", ") -> str:
    return between.join([*entries[:_SHOWN], *(["..."] if len(entries) > _SHOWN else [])])
