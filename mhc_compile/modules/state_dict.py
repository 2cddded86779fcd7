"""What a hyper-connection does while torch loads a state dict: it keeps its values where there are none, and explains what does not fit.

`nn.Module.load_state_dict` shows every module its own entries alone. Whether a checkpoint has no hyper-connections at all (that of a plain model,
which is welcome) or lacks some of them (which is an error) is known only when all have been seen, so what was seen is kept for the length of a call.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.config.coefficient_spec import MAX_STREAMS
from mhc_compile.errors import warn
from mhc_compile.mappings import MAPPINGS, columns, get_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.modules.readout import ReadOut

__all__ = ["NAMES", "SETTINGS", "after_loading", "guess_for", "guess_options", "settle_missing"]

#: The parameters of a hyper-connection.
NAMES = ("phi", "bias", "scale")
#: What else decides on the function that they stand for. A state dict carries it as metadata, which torch.save keeps and safetensors does not.
SETTINGS = ("mapping", "iterations", "eps", "preset")

#: The number of streams of every system that ships mHC.
_USUAL = 4


class _Call(threading.local):
    """What the current `load_state_dict` of this thread has met. Its list of missing keys is the same object throughout, and no other call's."""

    missing: list[str] | None = None

    def enter(self, missing: list[str]) -> None:
        if missing is not self.missing:
            self.missing = missing
            #: Keys of hyper-connections that kept their values.
            self.kept: list[str] = []
            #: Whether the state dict has values for any.
            self.found = False
            #: What was said already, so that it is not said again for every site.
            self.said: set[str] = set()

    def once(self, sentence: str) -> str:
        new = sentence not in self.said
        self.said.add(sentence)
        return f" {sentence}" if new else ""


_call = _Call()


def settle_missing(connection: HyperConnection | ReadOut, prefix: str, missing: list[str]) -> bool:
    """Takes back the complaint that `connection` has no values in the state dict, as long as no other hyper-connection has any.

    Args:
        connection: has just been loaded.
        prefix: its path, with a dot behind.
        missing: the keys that torch has missed so far; changed in place.

    Returns:
        Whether the state dict has values for `connection`.
    """
    _call.enter(missing)
    keys = [prefix + name for name in connection.names]
    if not all(key in missing for key in keys):
        _call.found = True
        missing.extend(_call.kept)  # so some are there and some are not, which is no plain model's checkpoint
        _call.kept = []
        return True
    if _call.found or any(parameter.is_meta for parameter in connection.parameters()):
        return False  # on the meta device there is nothing to keep
    if not _call.kept:
        warn(
            f"the state dict has no values for the hyper-connection {prefix.removesuffix('.')!r}: it looks like one of the plain model."
            " This hyper-connection and all others that it lacks keep the values they have"
        )
    missing[:] = [key for key in missing if key not in keys]
    _call.kept.extend(keys)
    return False


def after_loading(
    connection: HyperConnection, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str]
) -> None:
    """Explains the tensors of `state` that do not fit `connection`, and warns of those that are not finite.

    Args:
        connection: has just been loaded.
        state: the state dict.
        prefix: path of `connection`, with a dot behind.
        metadata: what `describe` wrote, if it survived.
        errors: what torch has complained of so far; changed in place.
    """
    path = prefix.removesuffix(".")
    names = connection.names
    shapes = {name: (tuple(state[prefix + name].shape), tuple(getattr(connection, name).shape)) for name in names}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if wrong:
        # torch has said so already, one sentence a tensor; this one says what can be done.
        errors[:] = [
            error for error in errors if not any(f"size mismatch for {prefix}{name}:" in error for name in wrong)
        ]
        listed = ", ".join(
            f"{prefix}{name} {list(has)} instead of {list(wants)}" for name, (has, wants) in wrong.items()
        )
        errors.append(
            f"the state dict has {listed} (width {connection.width}, streams {connection.streams}, mapping"
            f" {connection.mapping!r}).{_call.once(_way_out(connection, shapes['phi'][0], set(wrong)))}"
        )
    for name in names:
        if not _is_finite(state[prefix + name]):
            warn(
                f"{prefix}{name} has values in the state dict that are not finite: the run that wrote it had diverged, or the file is damaged"
            )
    for name in SETTINGS:
        has, wants = metadata.get(name, getattr(connection, name)), getattr(connection, name)
        if has == wants or wrong or (name == "iterations" and not get_mapping(connection.mapping).iterative):
            continue
        sentence = (
            f"was saved with {name}={has!r} and is loaded into one with {name}={wants!r}: the same parameters, another function."
            f" Attach and compile with options={{{name!r}: {has!r}}} for the function that was saved"
        )
        if name == "mapping":
            errors.append(f"hyper-connection {path!r} {sentence}.")
        elif _call.once(sentence):
            warn(f"hyper-connection {path!r} (and perhaps others) {sentence}")


def guess_options(shape: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """All `(streams, mapping, width)` that give phi this shape [n C, K], the likeliest first.

    Shapes do not tell everything: "unconstrained" always looks like "sinkhorn". That comes first as what nearly everybody uses; of the others
    those with four streams, then those that were there longest.
    """
    if len(shape) != 2:
        return []
    found = [
        (n, name, shape[0] // n)
        for name in MAPPINGS
        for n in range(1, MAX_STREAMS + 1)
        if columns(name, n) == shape[1] and shape[0] % n == 0
    ]
    found.sort(key=lambda entry: (entry[1] != "sinkhorn", entry[0] != _USUAL))
    return found


def guess_for(owner: nn.Module | None, shape: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """As `guess_options`, for a hyper-connection of `owner`: the width C of its streams is a size of some parameter there."""
    sizes = {size for parameter in owner.parameters() for size in parameter.shape} if owner is not None else set()
    return [guess for guess in guess_options(shape) if not sizes or guess[2] in sizes]


def _way_out(connection: HyperConnection, phi: tuple[int, ...], wrong: set[str]) -> str:
    if "phi" in wrong:
        guesses = guess_options(phi)
        guesses.sort(key=lambda guess: guess[1] != connection.mapping)
        for streams, mapping, width in guesses:
            if width != connection.width:
                continue
            pairs = {"streams": (streams, connection.streams), "mapping": (mapping, connection.mapping)}
            differing = {name: has for name, (has, mine) in pairs.items() if has != mine}
            made = ", ".join(f"{name}={value!r}" for name, value in differing.items())
            return f"The checkpoint was made with {made}: attach and compile with options={differing!r}."
        likeliest: dict[tuple[int, int], str] = {}  # not every mapping that looks like another one
        for streams, mapping, width in guesses:
            likeliest.setdefault((width, streams), mapping)
        others = [f"width {width} (streams={n}, mapping={mapping!r})" for (width, n), mapping in likeliest.items()]
        if others:
            return f"The checkpoint is of a model of {' or '.join(others)}, this one has width {connection.width}."
    return "No choice of options gives these shapes: the checkpoint is damaged, or of something else."


def _is_finite(value: Tensor) -> bool:
    # Fake, distributed and other special tensors are not looked into.
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta
    return not plain or bool(torch.isfinite(value).all())
