"""`mhc_compile.restore`: the hyper-connections of a checkpoint, put on a model that has none yet.

Nothing is traced: the names in a checkpoint say where the parameters belong, and their shapes say how many streams there are.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import COMPILED_ATTRIBUTE, child_module, original_module, state_metadata
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.sites import CONTAINER, HyperConnections, connections, declare_on, put_connection, unwrap
from mhc_compile.compilation.bindings import bound_names
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import AttachError
from mhc_compile.mappings import MAPPINGS
from mhc_compile.modules.gated import GatedConnection, create_connection
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.modules.readout import ReadOut
from mhc_compile.modules.state_dict import guess_for, guess_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["restore"]

_PARTS = frozenset((*HyperConnection.names, *GatedConnection.names))
_END_PARTS = frozenset(name for names in ReadOut.NAMES.values() for name in names)
#: The submodule of a hyper-connection that ends its chain.
_END = "read_out"
#: What checkpoints of `save_pretrained` and of the Trainer are called, in the order in which transformers looks for them.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def restore(
    model: nn.Module,
    checkpoint: Mapping[str, Any] | str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | Options | None = None,
) -> dict[str, HyperConnection]:
    """Attaches the hyper-connections that a checkpoint has, with their values. Nothing is traced, and no example inputs are needed.

    A model that was just built, or that `from_pretrained` gave, has no hyper-connections, and whoever loads a checkpoint of a model that had
    some leaves theirs out (with a remark about unexpected keys, or an error). Restore them before that, or afterwards; and before an optimizer
    is built. The other parameters of the checkpoint are not touched.

    Args:
        model: the plain model, or one that `torch.compile` returned. Hyper-connections that it has already get the values of the checkpoint.
        checkpoint: a state dict, a directory that `save_pretrained` or the Trainer wrote, or a file (safetensors, or torch.save of a state dict
            or of a dict with a "state_dict", as Lightning writes it). Names may be those of the compiled model (`_orig_mod.`) or not.
        options: as for `torch.compile(model, backend="mhc", options=options)`. `streams` and `mapping` are read off the checkpoint where they are
            not given. Shapes do not tell all mappings apart ("unconstrained" looks like "sinkhorn", four streams under "identity" like two
            under "sinkhorn"; the likelier one is taken). A state dict that was not through a safetensors file says which it was.

    Returns:
        All hyper-connections of the model by path.

    Raises:
        OptionError: the options are wrong.
        AttachError: the checkpoint has no hyper-connections, the model lacks a module that has one in the checkpoint, or shapes contradict
            the options or each other.
        FileNotFoundError: there is no such file, or no checkpoint in the directory.
    """
    parsed = Options.parse(options)
    fixed = set(Options.names()) if isinstance(options, Options) else set(options or ())
    read = _read(checkpoint)
    saved = _connections_of(read)
    if not saved:
        raise AttachError(
            f"{_shown(checkpoint)} has no hyper-connections: no name in it is like 'blocks.0.{CONTAINER}.attn.phi'."
            " Load it as it is; hyper-connections attach at the first compiled call or with mhc_compile.attach(model, ...)"
        )
    target = unwrap(model)
    # Everything is checked before anything is attached.
    plans = [
        _Plan(target, place, tensors, _noted(read, place, parsed, fixed), fixed) for place, tensors in saved.items()
    ]
    order = {id(module): position for position, module in enumerate(target.modules())}
    plans.sort(key=lambda plan: order[id(plan.declaring_module or plan.owner)])  # files sort by name: h.10 before h.2
    for index, plan in enumerate(plans):
        plan.carry_out(index)
    settle()
    return connections(target)


class _Plan:
    """One hyper-connection of the checkpoint: whose it is on the model, its options and its values."""

    def __init__(
        self, model: nn.Module, place: str, values: dict[str, Tensor], options: ResolvedOptions, fixed: set[str]
    ) -> None:
        path = [part for part in place.split(".") if part != COMPILED_ATTRIBUTE]
        cut = path.index(CONTAINER)
        self.place, self.values = place, values
        self.root, self.path = model, ".".join(path[:cut])
        self.owner = _module(model, path[:cut], place)
        self.name = ".".join(path[cut + 1 :])
        self.declaring_module = _carrier(self.owner, self.name)
        self.options = _fitting(place, self.owner, values, options.at(".".join(path)), fixed)
        self.width = values["phi"].shape[0] // self.options.streams
        self.last = any(name.startswith(_END) for name in values)
        like = create_connection(self.width, self.options, last=self.last, device="meta")
        missing = [name for name in bound_names(like) if name not in values]
        if missing:
            raise AttachError(f"{place}: the checkpoint lacks its {' and '.join(missing)}; it is incomplete")
        for name in bound_names(like):
            if values[name].shape != like.get_parameter(name).shape:
                raise AttachError(
                    f"{place}: {name} is {list(values[name].shape)} in the checkpoint; with {self.options.streams} streams of width {self.width}"
                    f" and mapping={self.options.mapping!r} it would be {list(like.get_parameter(name).shape)}. Give the options that the saved"
                    " model was compiled with"
                )
        container = getattr(self.owner, CONTAINER, None)
        if container is not None and not isinstance(container, HyperConnections):
            raise AttachError(
                f"{place}: module {'.'.join(path[:cut]) or type(self.owner).__name__!r} already has an attribute {CONTAINER!r}"
                f" ({type(container).__name__}); hyper-connections need that name. Rename the attribute"
            )
        self.existing = container.get(self.name) if container is not None else None
        if self.existing is not None and self.existing.phi.shape != values["phi"].shape:
            raise AttachError(
                f"{place}: phi is {list(values['phi'].shape)} in the checkpoint and {list(self.existing.phi.shape)} on the model, which has"
                f" {self.existing.streams} streams. Call mhc_compile.detach(model) first"
            )

    def carry_out(self, index: int) -> None:
        """Attaches it, unless it is there, and writes its values. `index`: its position in the model."""
        connection = self.existing
        if connection is None:
            near = next(self.owner.parameters(), None)
            phi = self.values["phi"]
            connection = create_connection(
                self.width,
                self.options,
                index=index,
                last=self.last,
                device=phi.device if near is None else near.device,
                dtype=phi.dtype,
            )
            put_connection(self.owner, self.name, connection, self.options, root=self.root, path=self.path)
            if self.declaring_module is not None:
                declare_on(self.declaring_module, connection)
        elif self.last:
            connection.end_chain()
        with torch.no_grad():
            for name in bound_names(connection):
                if name in self.values and not connection.get_parameter(name).is_meta:
                    connection.get_parameter(name).copy_(self.values[name])


def _carrier(owner: nn.Module, name: str) -> nn.Module | None:
    """The module whose call ends the branch, as far as the name tells; the first compiled call finds it for certain."""
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None


def _module(model: nn.Module, path: list[str], place: str) -> nn.Module:
    module = model
    for step in path:
        child = child_module(module, step)
        if child is None:
            raise AttachError(
                f"{place}: the checkpoint has a hyper-connection there, but {type(model).__name__} has no module {'.'.join(path)!r}."
                " Build the model that was saved"
            )
        module = original_module(child)
    return module


def _noted(checkpoint: Mapping[str, Any], place: str, options: ResolvedOptions, fixed: set[str]) -> ResolvedOptions:
    """The options with the mapping that the hyper-connection at `place` had when it was saved, where the state dict still says it."""
    noted = (state_metadata(checkpoint) or {}).get(place, {}).get("mapping", options.mapping)
    return replace(options, mapping=noted) if "mapping" not in fixed and noted in MAPPINGS else options


def _fitting(
    place: str, owner: nn.Module, values: Mapping[str, Tensor], options: ResolvedOptions, fixed: set[str]
) -> ResolvedOptions:
    """The options with the number of streams and the mapping that `phi [n C, K]` was made for, and with what the names of the tensors tell."""
    if "phi" not in values:
        raise AttachError(f"{place}: the checkpoint lacks its phi; it is incomplete")
    phi = values["phi"]
    if any(name.startswith(_END) for name in values):
        options = replace(options, read_out="learned")
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


def _connections_of(tensors: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """{"blocks.0.mhc.attn": {"phi": ..., "bias": ..., "scale": ...}, ...}, in the order of the checkpoint."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, part = name.rpartition(".")
        if not _ours(place) or not isinstance(value, Tensor):
            continue
        if place.endswith(f".{_END}") and part in _END_PARTS:
            found.setdefault(place.removesuffix(f".{_END}"), {})[f"{_END}.{part}"] = value
        elif part in _PARTS:
            found.setdefault(place, {})[part] = value
    return found


def _ours(name: str) -> bool:
    return CONTAINER in name.split(".")[:-1]


def _read(checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if not isinstance(checkpoint, (str, os.PathLike)):
        return checkpoint
    path = os.fspath(checkpoint)
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in _FILES if os.path.isfile(os.path.join(path, name))]
        if not files:
            raise FileNotFoundError(f"directory {path!r} has no checkpoint: none of {', '.join(_FILES)}")
        path = files[0]
    if path.endswith((".safetensors", ".index.json")):
        return dict(_entries(path))
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)  # type: ignore[no-any-return]


def _entries(path: str) -> Iterator[tuple[str, Any]]:
    """The tensors of hyper-connections in a safetensors file, or in the parts that an index lists. The others are not read."""
    if path.endswith(".index.json"):
        with open(path, encoding="utf-8") as file:
            places: dict[str, str] = json.load(file)["weight_map"]
        for part in sorted({part for name, part in places.items() if _ours(name.rpartition(".")[0])}):
            yield from _read(os.path.join(os.path.dirname(path), part)).items()
    else:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if _ours(name.rpartition(".")[0]):
                    yield name, file.get_tensor(name)


def _shown(checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> str:
    return repr(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else "the state dict"
