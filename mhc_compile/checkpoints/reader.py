"""Read the hyper-connections of a checkpoint: a state dict, a file, or a directory.

A state dict may lie at any depth of a checkpoint ({"model": ..., "optimizer": ..., "ema": ...}): it
is the mapping that has their names.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, plain_name
from mhc_compile.errors import CheckpointError, warn
from mhc_compile.modules.gated import GatedConnection
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.modules.readout import ReadOut

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The submodule of a hyper-connection that ends its chain.
READ_OUT = "read_out"

_PARTS = frozenset((*HyperConnection.names, *GatedConnection.names))
_READ_OUT_PARTS = frozenset(name for names in ReadOut.NAMES.values() for name in names)
#: The files of `save_pretrained` and the Trainer, in the order in which transformers tries them, of
#: adapters, and of `torch.distributed.checkpoint`.
_FILES = (
    *(f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")),
    "adapter_model.safetensors", "adapter_model.bin", ".metadata",
)  # fmt: skip
#: Where a checkpoint keeps several models (an average, for example), the first of these is read.
_USUAL = ("state_dict", "model", "model_state_dict", "module", "net", "network", "generator")
#: Classes of arguments that training scripts save next to the weights. They hold values alone.
_ARGUMENTS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


@dataclass
class SavedConnection:
    """One hyper-connection of a checkpoint."""

    path: str  # as the checkpoint spells it, with `_orig_mod` where a module was compiled
    values: dict[str, Tensor] = field(default_factory=dict)  # those of a read-out as "read_out.weight"
    settings: Mapping[str, Any] = field(default_factory=dict)  # as far as the checkpoint says


def read_connections(checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> list[SavedConnection]:
    """Return the hyper-connections of a checkpoint, in its order.

    Other entries of safetensors files and distributed checkpoints are not read.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the directory.
        CheckpointError: the file has objects that `torch.load` does not read safely.
    """
    entries = _read(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else _state_in(checkpoint)
    # Scripts rename the entries of a compiled model, and its metadata keep the old names.
    metadata = {plain_name(path): notes for path, notes in (_torch.state_metadata(entries) or {}).items()}
    found: dict[str, SavedConnection] = {}
    for name, value in entries.items():
        entry = split_entry(name)
        if entry is not None and isinstance(value, Tensor):
            path, part = entry
            saved = found.setdefault(path, SavedConnection(path, settings=metadata.get(plain_name(path), {})))
            saved.values[part] = value
    return list(found.values())


def split_entry(name: str) -> tuple[str, str] | None:
    """Split the name of a hyper-connection's parameter: ("h.0.mhc.attn", "phi").

    The parts of a read-out are ("h.0.mhc.attn", "read_out.weight"). Any other name gives None.
    """
    path, _, part = name.rpartition(".")
    if CONTAINER not in path.split(".")[:-1]:
        return None
    if path.endswith(f".{READ_OUT}") and part in _READ_OUT_PARTS:
        return path.removesuffix(f".{READ_OUT}"), f"{READ_OUT}.{part}"
    return (path, part) if part in _PARTS else None


def _read(path: str) -> Mapping[str, Any]:
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in _FILES if os.path.isfile(os.path.join(path, name))]
        if not files:
            raise FileNotFoundError(f"directory {path!r} has no checkpoint: none of {', '.join(_FILES)}")
        return next(filter(None, map(_read, files)), {})
    if path.endswith((".safetensors", ".index.json")):
        return dict(_entries(path))
    if os.path.basename(path) == ".metadata":
        return _distributed(os.path.dirname(path))
    with torch.serialization.safe_globals(_ARGUMENTS):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
            raise CheckpointError(
                f"{path!r} holds more than tensors and plain values ({', '.join(unsafe) or 'old format'}), which torch.load"
                f" reads only if you trust the file: mhc_compile.restore(model, torch.load({path!r}, weights_only=False))"
            ) from error
    return _state_in(content)


def _state_in(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict with hyper-connections in a checkpoint, empty if there is none."""
    found = dict(_states(content, ""))
    if not found:
        return {}
    rank = {name: position for position, name in enumerate(("", *_USUAL))}
    first, *others = sorted(found, key=lambda place: (rank.get(place.rpartition(".")[2], len(rank)), place.count(".")))
    if others:
        warn(
            f"the checkpoint has hyper-connections in {', '.join(map(repr, (first, *others)))}; those in {first!r} are"
            f" taken. For others give the state dict alone, that in {others[0]!r}, for example"
        )
    return found[first]


def _states(content: object, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the mappings that have names of hyper-connections, each with its place."""
    if not isinstance(content, Mapping):
        return
    names = [name for name in content if isinstance(name, str)]
    if any(isinstance(content[name], Tensor) and split_entry(name) for name in names):
        yield place, content
        return
    for name in names:
        yield from _states(content[name], f"{place}.{name}" if place else name)


def _distributed(path: str) -> Mapping[str, Any]:
    """Read hyper-connections from a directory of `torch.distributed.checkpoint`."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(path).read_metadata()
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if split_entry(name) and isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=path, no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in state.items():
        *above, last = (metadata.planner_data or {}).get(name, (name,))
        inner = nested
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return _state_in(nested)


def _entries(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of hyper-connections in a safetensors file, or in the files of an index."""
    if path.endswith(".index.json"):
        with open(path, encoding="utf-8") as file:
            shards: dict[str, str] = json.load(file)["weight_map"]
        for shard in sorted({shard for name, shard in shards.items() if split_entry(name)}):
            yield from _read(os.path.join(os.path.dirname(path), shard)).items()
    else:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in filter(split_entry, file.keys()):
                yield name, file.get_tensor(name)
