"""Read the hyper-connections of a checkpoint: a state dict, a file, or a directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER
from mhc_compile.modules.gated import GatedConnection
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.modules.readout import ReadOut

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: The submodule of a hyper-connection that ends its chain.
READ_OUT = "read_out"

_PARTS = frozenset((*HyperConnection.names, *GatedConnection.names))
_READ_OUT_PARTS = frozenset(name for names in ReadOut.NAMES.values() for name in names)
#: The files of `save_pretrained` and the Trainer, in the order in which transformers tries them.
_FILES = tuple(f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


@dataclass
class SavedConnection:
    """One hyper-connection of a checkpoint."""

    path: str  # as the checkpoint spells it, with `_orig_mod` where a module was compiled
    values: dict[str, Tensor] = field(default_factory=dict)  # those of a read-out as "read_out.weight"
    mapping: str | None = None  # None if the checkpoint does not say


def read_connections(checkpoint: Mapping[str, Any] | str | os.PathLike[str]) -> list[SavedConnection]:
    """Return the hyper-connections of a checkpoint, in its order.

    Other entries of safetensors files are not read.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the directory.
    """
    entries = _read(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    metadata: Mapping[str, Any] = _torch.state_metadata(entries) or {}
    found: dict[str, SavedConnection] = {}
    for name, value in entries.items():
        entry = split_entry(name)
        if entry is not None and isinstance(value, Tensor):
            path, part = entry
            saved = found.setdefault(path, SavedConnection(path, mapping=metadata.get(path, {}).get("mapping")))
            saved.values[part] = value
    return list(found.values())


def split_entry(name: str) -> tuple[str, str] | None:
    """Split the name of a hyper-connection's parameter: ("h.0.mhc.attn", "phi").

    The parts of a read-out are ("h.0.mhc.attn", "read_out.weight"). Any other name gives None.
    """
    path, _, part = name.rpartition(".")
    if not _is_inside(path):
        return None
    if path.endswith(f".{READ_OUT}") and part in _READ_OUT_PARTS:
        return path.removesuffix(f".{READ_OUT}"), f"{READ_OUT}.{part}"
    return (path, part) if part in _PARTS else None


def _is_inside(path: str) -> bool:
    return CONTAINER in path.split(".")[:-1]


def _read(path: str) -> Mapping[str, Any]:
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
    """Yield the tensors of hyper-connections in a safetensors file, or in the files of an index."""
    if path.endswith(".index.json"):
        with open(path, encoding="utf-8") as file:
            shards: dict[str, str] = json.load(file)["weight_map"]
        for shard in sorted({shard for name, shard in shards.items() if _is_inside(name.rpartition(".")[0])}):
            yield from _read(os.path.join(os.path.dirname(path), shard)).items()
    else:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if _is_inside(name.rpartition(".")[0]):
                    yield name, file.get_tensor(name)
