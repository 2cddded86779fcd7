"""`mhc convert`: a checkpoint on disk in its other layout, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import CheckpointError
from mhc_compile.interop.planner import plan_from_native, plan_to_native
from mhc_compile.interop.safetensors_io import SUFFIX, Checkpoint, Written, open_checkpoint, read, write, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mhc_compile.interop.plan import Plan

#: Metadata key of files in our layout; its value is the preset that they were converted from.
_MARK = "mhc_preset"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    source: Path
    out: Path
    plan: Plan
    files: dict[str, int]  # the safetensors files written, with their sizes in bytes
    copied: tuple[str, ...]  # other files of the folder
    left: tuple[str, ...]  # subfolders, which were left out

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "files": self.files,
            "copied": list(self.copied),
            "left": list(self.left),
            **self.plan.to_dict(),
        }


def convert(
    source: Path,
    out: Path,
    preset: str,
    *,
    native: bool,
    spelling: str = "transformers",
    branches: Mapping[str, str] | None = None,
    force: bool = False,
) -> Conversion:
    """Write the checkpoint `source` to `out` in its other layout.

    Args:
        source: a `.safetensors` file, or a folder with one, or with several and their index.
        out: a file for a file, a folder for a folder. It appears complete or not at all.
        preset: the system on the native side.
        native: convert to its layout rather than from it.
        spelling: as for `to_native`.
        branches: as for `to_native`.
        force: replace `out` if it exists.

    Raises:
        OptionError: no such preset, layout or spelling.
        CheckpointError: the checkpoint is damaged, `out` exists or cannot be written, or as for
            `to_native` and `from_native`.
    """
    checkpoint = open_checkpoint(source)
    _reject(checkpoint, out, force=force)
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    marks = {metadata[_MARK] for metadata in checkpoint.files.values() if _MARK in metadata}
    if native and marks - {preset}:
        raise CheckpointError(
            f"preset {preset!r}: {source} was converted from {', '.join(map(repr, sorted(marks)))}, as its metadata say;"
            " use that preset"
        )
    plan = (
        plan_to_native(shapes, preset, spelling=spelling, branches=branches)
        if native
        else plan_from_native(shapes, preset, branches=branches)
    )
    with _appearing(out, folder=checkpoint.path.is_dir()) as place:
        files = _write(checkpoint, plan, place)
    copied, left = (tuple(item.name for item in items) for items in (checkpoint.other, checkpoint.left))
    return Conversion(checkpoint.path, out, plan, files, copied, left)


def _reject(checkpoint: Checkpoint, out: Path, *, force: bool) -> None:
    folder = checkpoint.path.is_dir()
    here, there = checkpoint.path.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"{out} is {checkpoint.path}, or one of them is in the other: choose another place for the result"
        )
    if not folder and out.suffix != SUFFIX:
        raise CheckpointError(f"{checkpoint.path} is a file, so the result is one: give {out} the ending {SUFFIX}")
    if not out.parent.is_dir():
        raise CheckpointError(f"there is no folder {out.parent} for {out.name}: make it first")
    if not out.exists() or (folder and out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise CheckpointError(f"{out} is there already; --force (force=True) replaces it")
    if out.is_dir() != folder:
        raise CheckpointError(
            f"{out} is {'a folder' if out.is_dir() else 'a file'} and {checkpoint.path} is not; choose another name"
        )
    if folder and (not any(out.glob(f"*{SUFFIX}")) or any(item.is_dir() for item in out.iterdir())):
        raise CheckpointError(
            f"{out} holds more than a checkpoint, or none, and is not replaced; choose another name, or remove it"
        )


@contextmanager
def _appearing(out: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `out` at the end, and removed after an error."""
    place = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    try:
        if folder:
            place.mkdir()
        yield place
        if folder and out.is_dir() and any(out.iterdir()):
            out.rename(old)
        place.replace(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for item in (place, old):
            if item.is_dir():
                shutil.rmtree(item)
            else:
                item.unlink(missing_ok=True)


def _write(checkpoint: Checkpoint, plan: Plan, place: Path) -> dict[str, int]:
    """Write the files of the result; every entry goes to the file of its first source."""
    tensors: dict[Path, list[tuple[str, Written]]] = {file: [] for file in checkpoint.files}
    for target, sources in plan.entries.items():
        tensors[checkpoint.tensors[sources[0]].path].append((target, _tensor(checkpoint, plan, target, sources)))
    sizes: dict[str, int] = {}
    folder = checkpoint.path.is_dir()
    for file, entries in tensors.items():
        metadata = {name: value for name, value in checkpoint.files[file].items() if name != _MARK}
        if not plan.native:
            metadata[_MARK] = plan.preset
        sizes[file.name] = write(place / file.name if folder else place, entries, metadata)
    for item in checkpoint.other:
        shutil.copyfile(item, place / item.name)
    if checkpoint.index is not None:
        _write_index(checkpoint.index, place / checkpoint.index.name, tensors)
    return sizes


def _tensor(checkpoint: Checkpoint, plan: Plan, target: str, sources: tuple[str, ...]) -> Written:
    stored = [checkpoint.tensors[source] for source in sources]
    change = plan.changes.get(target)
    if change is None:
        return Written(stored[0].dtype, stored[0].shape, stored[0].stop - stored[0].start, stored[0].chunks)
    if len({entry.dtype for entry in stored}) > 1:
        raise CheckpointError(f"{', '.join(sources)} are of different dtypes, and become one tensor")
    return written(stored[0].dtype, change.after, lambda: change.apply([read(entry) for entry in stored]))


def _write_index(old: Path, new: Path, tensors: Mapping[Path, list[tuple[str, Written]]]) -> None:
    content: dict[str, Any] = json.loads(old.read_text())
    content["weight_map"] = {name: file.name for file, entries in tensors.items() for name, _ in entries}
    content.setdefault("metadata", {})["total_size"] = sum(t.size for entries in tensors.values() for _, t in entries)
    new.write_text(json.dumps(content, indent=2) + "\n")
