"""`mhc_compile.load_state_dict`: any checkpoint of the model into the model, or a sentence that says what stands in the way."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mhc_compile._torch import COMPILED_ATTRIBUTE, set_state_metadata, state_metadata
from mhc_compile.attachment.sites import CONTAINER, connections, unwrap
from mhc_compile.config.options import Options
from mhc_compile.errors import AttachError
from mhc_compile.modules.state_dict import NAMES, guess_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

__all__ = ["load_state_dict", "plain_name"]

#: The path of a hyper-connection in a state dict, with the name of its parameter.
_ENTRY = re.compile(rf"((?:.+\.)?{CONTAINER}\..+)\.({'|'.join(NAMES)})")
#: How many paths a message lists.
_SHOWN = 3


def load_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, assign: bool = False) -> Any:
    """Loads a checkpoint of the plain model, of the model with hyper-connections, or of a compiled version of either.

    As `model.load_state_dict(state, strict, assign)`, and it

    - does not mind on which side `torch.compile` has put its `_orig_mod.` into the names;
    - says what to do where the checkpoint has hyper-connections and the model has not, or has others.

    A checkpoint of the plain model leaves the hyper-connections as they are, with a warning; `model.load_state_dict` does so too.

    Args:
        model: any module, or one that `torch.compile` returned. For a checkpoint with hyper-connections it must have them: call
            `mhc_compile.attach` first.
        state: what `state_dict()` returned, or what `safetensors.torch.load_file` read. It stays as it is.
        strict: as for `nn.Module.load_state_dict`.
        assign: as for `nn.Module.load_state_dict`.

    Returns:
        What `nn.Module.load_state_dict` returns: missing and unexpected keys.

    Raises:
        AttachError: with `strict`, the hyper-connections of the checkpoint are not those of the model.
        RuntimeError: torch's, where other entries are missing, unexpected or of the wrong shape, and where those of hyper-connections are of
            the wrong shape.
    """
    target = unwrap(model)
    actual = {plain_name(name): name for name in target.state_dict()}
    renamed = OrderedDict((actual.get(plain_name(name), plain_name(name)), value) for name, value in state.items())
    metadata = state_metadata(state)
    if metadata is not None:
        paths = {plain_name(path): path for path, _ in target.named_modules()}
        notes = {paths.get(plain_name(path), plain_name(path)): dict(entry) for path, entry in metadata.items()}
        set_state_metadata(renamed, notes)
    if strict:
        _compare(target, renamed)
    return target.load_state_dict(renamed, strict=strict, assign=assign)


def plain_name(name: str) -> str:
    """The name of a parameter or module without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED_ATTRIBUTE)


def _compare(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises AttachError unless `state` has the hyper-connections of `model`, or none."""
    saved, present = _saved(state), connections(model)
    if not saved:
        return
    kind = type(model).__name__
    if not present:
        raise AttachError(
            f"the checkpoint has {_list(saved, 'hyper-connection')} and {kind} has none. Attach them before loading:"
            f" mhc_compile.attach(model, *example_inputs{_options(model, saved)})"
        )
    more, fewer = [path for path in saved if path not in present], [path for path in present if path not in saved]
    if more or fewer:
        parts = [
            f"the checkpoint has {_list(more, 'hyper-connection')} that {kind} lacks" if more else "",
            f"{kind} has {_list(fewer, 'hyper-connection')} that the checkpoint lacks" if fewer else "",
        ]
        raise AttachError(
            f"{', and '.join(filter(None, parts))}: it was made by another version of the model, or with other options"
            " (min_chain_length). Make the models the same; strict=False loads what both have"
        )


def _saved(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The hyper-connections in `state` by path, with the shape of phi."""
    entries: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in state.items():
        match = _ENTRY.fullmatch(name)
        if match:
            entries.setdefault(match[1], {})[match[2]] = tuple(getattr(value, "shape", ()))
    # A module of the model's own that is called `mhc` does not have these three.
    return {path: shapes["phi"] for path, shapes in entries.items() if shapes.keys() == set(NAMES)}


def _options(model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> str:
    """The likeliest options that the shapes of phi tell, as an argument; nothing if they are the default ones, or there are none."""
    guesses = [[(n, mapping) for n, mapping, _ in _guess(model, path, saved[path])] for path in saved]
    found = [guess for guess in guesses[0] if all(guess in others for others in guesses)]
    default = Options().resolved
    if not found or found[0] == (default.streams, default.mapping):
        return ""
    streams, mapping = found[0]
    return f", options={ ({'streams': streams} | ({'mapping': mapping} if mapping != default.mapping else {}))!r}"


def _guess(model: nn.Module, path: str, shape: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """What gives phi its shape, as far as the block may have such streams."""
    return guess_for(dict(model.named_modules()).get(path.split(f".{CONTAINER}.")[0]), shape)


def _list(paths: Iterable[str], noun: str) -> str:
    paths = list(paths)
    shown = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    return f"{len(paths)} {noun}{'s' if len(paths) > 1 else ''} ({shown})"
