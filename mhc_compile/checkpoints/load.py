"""`mhc_compile.load_state_dict`: load any checkpoint of a model, or explain why it does not fit."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, connections, plain_name, unwrap
from mhc_compile.checkpoints.reader import split_entry
from mhc_compile.config.options import Options
from mhc_compile.errors import AttachError
from mhc_compile.modules.state_dict import NAMES, guess_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

#: The number of paths in a message.
_SHOWN = 3
#: What DDP puts before all names.
_WRAPPER = "module."


def load_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, assign: bool = False) -> Any:
    """Load a checkpoint of the plain model or of the one with hyper-connections, compiled or not.

    This is `model.load_state_dict(state, strict, assign)` with two additions: names may contain the
    `_orig_mod.` of `torch.compile` and begin with the `module.` of DDP on either side, and the
    error says what to do if the checkpoint has hyper-connections and the model has none, or others.

    A checkpoint of the plain model leaves the hyper-connections unchanged, with a warning, as it
    does in `model.load_state_dict`.

    Args:
        model: any module, or the result of `torch.compile`. For a checkpoint with hyper-connections
            it must have them: call `mhc_compile.attach` first.
        state: a `state_dict()`, or the result of `safetensors.torch.load_file`. It is not modified.
        strict: as for `nn.Module.load_state_dict`.
        assign: as for `nn.Module.load_state_dict`.

    Returns:
        Missing and unexpected keys, as `nn.Module.load_state_dict` does.

    Raises:
        AttachError: with `strict`, the hyper-connections of checkpoint and model differ.
        RuntimeError: torch's, if other entries are missing or unexpected, or shapes differ.
    """
    target = unwrap(model)
    actual = {plain_name(name): name for name in target.state_dict()}
    translate = _without_wrapper([plain_name(name) for name in state], list(actual))
    renamed = OrderedDict((actual.get(new := translate(plain_name(name)), new), value) for name, value in state.items())
    metadata = _torch.state_metadata(state)
    if metadata is not None:
        paths = {plain_name(path): path for path, _ in target.named_modules()}
        notes = {paths.get(new := translate(plain_name(path)), new): dict(entry) for path, entry in metadata.items()}
        _torch.set_state_metadata(renamed, notes)
    if strict:
        _compare(target, renamed)
    return target.load_state_dict(renamed, strict=strict, assign=assign)


def _without_wrapper(given: list[str], wanted: list[str]) -> Callable[[str], str]:
    """Return the translation of the names in `given` that adds or drops what DDP puts first."""
    inside, outside = (bool(names) and all(name.startswith(_WRAPPER) for name in names) for names in (wanted, given))
    if outside and not inside:
        return lambda name: name.removeprefix(_WRAPPER)
    return (lambda name: f"{_WRAPPER}{name}") if inside and not outside else lambda name: name


def _compare(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise AttachError unless `state` has the hyper-connections of `model`, or none."""
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
    """Return the shape of phi of every hyper-connection in `state`, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        path, part = split_entry(name) or ("", "")
        entries.setdefault(path, {})[part] = value
    # A user's module called `mhc` does not have all three.
    complete = {path: parts["phi"] for path, parts in entries.items() if parts.keys() >= set(NAMES)}
    return {path: tuple(getattr(phi, "shape", ())) for path, phi in complete.items()}


def _options(model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> str:
    """Return the likeliest options for these shapes of phi as an argument, "" for the defaults."""
    modules = dict(model.named_modules())
    owners = {path: modules.get(path.split(f".{CONTAINER}.")[0]) for path in saved}
    guesses = [[(n, mapping) for n, mapping, _ in guess_for(owners[path], saved[path])] for path in saved]
    found = [guess for guess in guesses[0] if all(guess in others for others in guesses)]
    default = Options().resolved
    if not found or found[0] == (default.streams, default.mapping):
        return ""
    streams, mapping = found[0]
    return f", options={ ({'streams': streams} | ({'mapping': mapping} if mapping != default.mapping else {}))!r}"


def _list(paths: Iterable[str], noun: str) -> str:
    paths = list(paths)
    shown = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    return f"{len(paths)} {noun}{'s' if len(paths) > 1 else ''} ({shown})"
