"""`mhc_compile.restore`: attach the hyper-connections of a checkpoint to a model that has none.

Nothing is traced: the names in a checkpoint give the places of the parameters, and the shapes give
the number of streams.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.attachment.ledger import record_of
from mhc_compile.attachment.model_tree import (
    CONTAINER,
    HyperConnections,
    connections,
    find_module,
    plain_name,
    split_path,
    unwrap,
)
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.plan import PlannedConnection, give
from mhc_compile.checkpoints.reader import READ_OUT, SavedConnection, read_connections
from mhc_compile.compilation.bindings import bound_names
from mhc_compile.compilation.pipeline import run_on_streams
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.config.presets import PRESETS
from mhc_compile.errors import AttachError
from mhc_compile.mappings import MAPPINGS
from mhc_compile.modules.gated import create_connection
from mhc_compile.modules.state_dict import SETTINGS, guess_for, guess_options, saved_speeds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.modules.hyper_connection import HyperConnection


def restore(
    model: nn.Module,
    checkpoint: Mapping[str, Any] | str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | Options | None = None,
) -> dict[str, HyperConnection]:
    """Attach the hyper-connections of a checkpoint, with their values, without example inputs.

    A model that was just built, or returned by `from_pretrained`, has no hyper-connections, and
    loading a checkpoint into it leaves theirs out (with a note about unexpected keys, or an error).
    Call this before or after that, and before building an optimizer. The other parameters of the
    checkpoint are not touched.

    Args:
        model: the plain model, or the result of `torch.compile` for it. Hyper-connections that it
            already has get the values of the checkpoint.
        checkpoint: a state dict, also one inside other dicts ("state_dict", "model", ...), a file
            with it (safetensors or torch.save), or a directory written by `save_pretrained`, the
            Trainer, peft or `torch.distributed.checkpoint`. Names may contain `_orig_mod.`, and
            begin with a prefix that the model does not have (`module.`, `model.`).
        options: as for `torch.compile(model, backend="mhc", options=options)`. `streams` and
            `mapping` are inferred from the checkpoint if not given. Shapes do not determine every
            mapping ("unconstrained" looks like "sinkhorn", four streams under "identity" look like
            two under "sinkhorn"; the likelier one is taken); the metadata of a state dict do, and
            give preset, iterations and eps as well, which safetensors files do not keep.

    Returns:
        All hyper-connections of the model by path.

    Raises:
        OptionError: the options are wrong.
        AttachError: the checkpoint has no hyper-connections, the model lacks a module that has one
            in the checkpoint, or shapes contradict the options or each other.
        FileNotFoundError: there is no such file, or no checkpoint in the directory.
        CheckpointError: the file has objects that `torch.load` does not read safely.
    """
    parsed = Options.parse(options)
    fixed = set(Options.names()) if isinstance(options, Options) else set(options or ())
    saved = read_connections(checkpoint)
    if not saved:
        source = repr(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else "the state dict"
        raise AttachError(
            f"{source} has no hyper-connections: no name in it is like 'blocks.0.{CONTAINER}.attn.phi'."
            " Load it as it is; hyper-connections attach at the first compiled call or with mhc_compile.attach(model, ...)"
        )
    if any(name.startswith(READ_OUT) for connection in saved for name in connection.values):
        parsed = replace(parsed, read_out="learned")  # at the last site of each chain, for all of them
    target = unwrap(model)
    # Everything is checked before anything is attached.
    skipped = _prefix(target, [plain_name(connection.path).split(".") for connection in saved])
    found = [_Restored(target, connection, skipped, parsed, fixed) for connection in saved]
    order = {id(module): position for position, module in enumerate(target.modules())}
    found.sort(key=lambda one: order[id(one.declaring_module or one.owner)])  # files sort h.10 before h.2
    lists: set[str] = set()
    for index, one in enumerate(found):
        connection = one.carry_out(index)
        blocks = re.split(r"(?:^|\.)\d+(?:\.|$)", split_path(one.path)[0])[0]
        if blocks not in lists:  # an encoder and a decoder have chains of their own
            record_of(connection).index = 0
        lists.add(blocks)
    settle()
    run_on_streams(target, parsed)
    return connections(target)


class _Restored:
    """One hyper-connection to restore: its place in the model, its options and its values."""

    def __init__(
        self, model: nn.Module, saved: SavedConnection, skipped: int, options: ResolvedOptions, fixed: set[str]
    ) -> None:
        place, values = saved.path, saved.values
        self.path = ".".join(plain_name(place).split(".")[skipped:])
        path, self.name = split_path(self.path)
        self.model, self.values, self.settings = model, values, saved.settings
        self.owner = find_module(model, path, place)
        self.declaring_module = _declaring_module(self.owner, self.name)
        options = _saved_options(saved.settings, options, fixed)
        self.options = _infer_options(place, self.owner, values, options.at(f"{path}.{self.name}".lstrip(".")), fixed)
        self.width = values["phi"].shape[0] // self.options.streams
        self.last = any(name.startswith(READ_OUT) for name in values)
        like = create_connection(self.width, self.options, last=self.last, device="meta")
        missing = [name for name in bound_names(like) if name not in values]
        if missing:
            raise AttachError(f"{place}: the checkpoint lacks its {' and '.join(missing)}; it is incomplete")
        for name in bound_names(like):
            if values[name].shape != like.get_parameter(name).shape:
                raise AttachError(
                    f"{place}: {name} is {list(values[name].shape)} in the checkpoint; with {self.options.streams}"
                    f" streams of width {self.width} and mapping={self.options.mapping!r} it would be"
                    f" {list(like.get_parameter(name).shape)}. Give the options that the saved model was compiled with"
                )
        container = getattr(self.owner, CONTAINER, None)
        if container is not None and not isinstance(container, HyperConnections):
            raise AttachError(
                f"{place}: module {path or type(self.owner).__name__!r} already has an attribute {CONTAINER!r}"
                f" ({type(container).__name__}); hyper-connections need that name. Rename the attribute"
            )
        self.existing = container.get(self.name) if container is not None else None
        if self.existing is not None and self.existing.phi.shape != values["phi"].shape:
            raise AttachError(
                f"{place}: phi is {list(values['phi'].shape)} in the checkpoint and {list(self.existing.phi.shape)} on the"
                f" model, which has {self.existing.streams} streams. Call mhc_compile.detach(model) first"
            )

    def carry_out(self, index: int) -> HyperConnection:
        """Attach it unless it exists, and write its values. `index`: its position in the model."""
        connection = self.existing
        if connection is None:
            phi = self.values["phi"]
            # The module that the branch is named after; the first compiled call corrects it.
            declared_by = () if self.declaring_module is None else (_join(split_path(self.path)),)
            dtype = str(phi.dtype).removeprefix("torch.")
            entry = PlannedConnection(self.path, self.width, index, declared_by, last=self.last, dtype=dtype)
            connection = give(self.model, entry, self.options, device=phi.device)
        elif self.last:
            connection.end_chain()
        values = connection.converted(self.values, "", self.settings)
        with torch.no_grad():
            for name in bound_names(connection):
                if name in values and not connection.get_parameter(name).is_meta:
                    connection.get_parameter(name).copy_(values[name])
        return connection


def _declaring_module(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None


def _join(parts: tuple[str, str]) -> str:
    return ".".join(filter(None, parts))


def _prefix(model: nn.Module, paths: list[list[str]]) -> int:
    """Return how many leading parts, the same in all paths, must go so that the owners exist.

    Wrappers add them (`module` of DDP, an attribute of a Lightning module, `base_model.model` of
    peft). It is 0 if no number will do.
    """
    known = {plain_name(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    cuts = [path.index(CONTAINER) for path in paths]
    for number in range(min(cuts) + 1):
        owners = {".".join(path[number:cut]) for path, cut in zip(paths, cuts, strict=True)}
        branches = {".".join(path[number:cut] + path[cut + 1 :]) for path, cut in zip(paths, cuts, strict=True)}
        if owners <= known and (number == 0 or branches & known):
            return number if len({tuple(path[:number]) for path in paths}) == 1 else 0
    return 0


def _saved_options(settings: Mapping[str, Any], options: ResolvedOptions, fixed: set[str]) -> ResolvedOptions:
    """Return the options with saved settings, except those that are fixed, or unknown here."""
    known = {name: settings[name] for name in SETTINGS if name in settings and name not in fixed}
    for name, speed in saved_speeds(settings, {}).items():
        option = {"bias": "gate_speed", "scale": "scale_speed"}[name]
        if option not in fixed:
            known[option] = speed
    if known.get("mapping") not in MAPPINGS:
        known.pop("mapping", None)
    if known.get("preset") not in PRESETS:
        known.pop("preset", None)
    else:
        preset = PRESETS[known["preset"]]
        known["single_pass"] = options.single_pass if "single_pass" in fixed else preset.single_pass
        known["init"] = options.init if preset.preserves else "random"
    return replace(options, **known)


def _infer_options(
    place: str, owner: nn.Module, values: Mapping[str, Tensor], options: ResolvedOptions, fixed: set[str]
) -> ResolvedOptions:
    """Return the options with the streams, mapping and read-out that names and shapes imply."""
    if "phi" not in values:
        raise AttachError(f"{place}: the checkpoint lacks its phi; it is incomplete")
    phi = values["phi"]
    if "up" in values and phi.dim() == values["up"].dim() == 2:
        rank = values["up"].shape[0]
        return replace(options, rank=rank, streams=phi.shape[1] - rank, mapping="identity", init="random")
    static = phi.dim() == 2 and phi.shape[1] == 0 and "bias" in values
    if static:
        options = replace(options, token_dependent=False)
    shape = (phi.shape[0], values["bias"].shape[0]) if static else tuple(phi.shape)
    guesses = guess_for(owner, shape) or guess_options(shape)
    for n, mapping, _ in sorted(guesses, key=lambda guess: guess[1] != options.mapping):
        if (n == options.streams or "streams" not in fixed) and (mapping == options.mapping or "mapping" not in fixed):
            return replace(options, streams=n, mapping=mapping)
    said = ", ".join(f"{name}={getattr(options, name)!r}" for name in ("streams", "mapping") if name in fixed)
    raise AttachError(
        f"{place}: phi is {list(phi.shape)} in the checkpoint, which does not fit {said or 'any number of streams'}."
        " Give the options that the saved model was compiled with"
    )
