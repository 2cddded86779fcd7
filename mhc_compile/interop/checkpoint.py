"""A checkpoint on disk: one safetensors file, or a folder with one, or with several and their index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_compile.errors import CheckpointError
from mhc_compile.interop.files import Stored, read_header

__all__ = ["INDEX", "SUFFIX", "Checkpoint", "open_checkpoint"]

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What there is of a checkpoint on disk; nothing but headers has been read.

    Attributes:
        path: of the file or the folder.
        files: its safetensors files, with the metadata of each.
        tensors: of all files, by name.
        index: path of the index, None if there is none.
        other: files of the folder that are no tensors: configs, tokenizers.
        left: folders in the folder.
    """

    path: Path
    files: dict[Path, dict[str, str]]
    tensors: dict[str, Stored]
    index: Path | None
    other: tuple[Path, ...]
    left: tuple[Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def marks(self, key: str) -> set[str]:
        """The values that the files' metadata have under `key`."""
        return {metadata[key] for metadata in self.files.values() if key in metadata}


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a `.safetensors` file, an index of several, or a folder with either.

    Raises:
        CheckpointError: there is none, it is damaged, or a folder has several and no index.
    """
    if path.name.endswith(INDEX):
        path = path.parent
    if not path.is_dir():
        if path.suffix != SUFFIX:
            raise CheckpointError(
                f"{path} is no {SUFFIX} file and no folder. Files of torch.save hold code: load them, and save them with safetensors"
            )
        tensors, metadata = read_header(path)
        return Checkpoint(path, {path: metadata}, tensors, None, (), ())
    indices = sorted(path.glob(f"*{INDEX}"))
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(indices) > 1 or (len(found) > 1 and not indices) or not found:
        listed = ", ".join(item.name for item in (*indices, *found)[:4]) or "none"
        raise CheckpointError(
            f"folder {path} does not hold one checkpoint: expected one {SUFFIX} file, or one *{INDEX} with its files; found {listed}"
        )
    index = indices[0] if indices else None
    names = _weight_map(index) if index else dict.fromkeys(read_header(found[0])[0], found[0].name)
    files: dict[Path, dict[str, str]] = {}
    all_tensors: dict[str, Stored] = {}
    for file in (path / name for name in sorted(set(names.values()))):
        tensors, files[file] = read_header(file)
        all_tensors |= tensors
    lost = [name for name, file in names.items() if name not in all_tensors or all_tensors[name].path.name != file]
    lost += [name for name in all_tensors if name not in names]
    if lost:
        raise CheckpointError(
            f"{index}: {lost[0]!r} is not where the index says ({len(lost)} such): index and files do not belong together"
        )
    rest = [item for item in sorted(path.iterdir()) if item not in files and item != index]
    return Checkpoint(
        path,
        files,
        all_tensors,
        index,
        tuple(item for item in rest if item.is_file()),
        tuple(item for item in rest if not item.is_file()),
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text())
        names = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({type(error).__name__}: {error})") from error
    if any(Path(file).name != file for file in names.values()):
        raise CheckpointError(f"{index} names files outside its folder")
    return names
