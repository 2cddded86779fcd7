"""Safetensors files and folders, tensor by tensor; entries that stay are copied byte by byte.

A file is 8 bytes, the length of the header; the header, JSON of {name: {"dtype", "shape",
"data_offsets"}} and "__metadata__"; the tensors. A checkpoint is a file, a folder with one, or a
folder with several and their index.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_METADATA = "__metadata__"
#: The dtypes that parameters of hyper-connections may have.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24
#: The longest header that the safetensors library reads.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; its bytes are those from `start` up to `stop`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes in pieces of at most 16 MiB."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.path} ends in the middle of a tensor: it has been cut off")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Written:
    """A tensor to write; `chunks` makes its bytes when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterator[bytes]]


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a file by name, in the order of their bytes, and its metadata."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop(_METADATA, {})
        stored = {
            name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is no safetensors file ({error})") from error
    if any(not 8 + length <= entry.start <= entry.stop <= size for entry in stored.values()):
        raise CheckpointError(f"{path} is shorter than its header says: it has been cut off")
    return dict(sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop))), metadata


def read(stored: Stored) -> Tensor:
    """Return the tensor, of one of the dtypes that parameters of hyper-connections have."""
    data = bytearray().join(stored.chunks())
    return torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).reshape(stored.shape)


def written(dtype: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Written:
    """Return a tensor that `make` computes when its turn comes."""
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"a parameter of a hyper-connection is of dtype {dtype}; expected one of {', '.join(_DTYPES)}"
        )

    def chunks() -> Iterator[bytes]:
        value = make()
        assert tuple(value.shape) == shape
        assert value.dtype == _DTYPES[dtype]
        yield value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return Written(dtype, shape, torch.Size(shape).numel() * _DTYPES[dtype].itemsize, chunks)


def write(path: Path, tensors: Sequence[tuple[str, Written]], metadata: Mapping[str, str]) -> int:
    """Write `tensors` to a file, in this order, and return its size in bytes."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, offset + tensor.size)}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, tensor in tensors:
                file.writelines(tensor.chunks())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return 8 + len(text) + offset


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, a file or a folder, of which the headers have been read."""

    path: Path
    files: dict[Path, dict[str, str]]  # with the metadata of each
    tensors: dict[str, Stored]  # of all files
    index: Path | None
    other: tuple[Path, ...]  # files of the folder that are copied: configs, tokenizers
    left: tuple[Path, ...]  # subfolders, which are not converted


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, an index of several, or a folder with either.

    Raises:
        CheckpointError: there is none, it is damaged, or a folder has several and no index.
    """
    if path.name.endswith(_INDEX):
        path = path.parent
    if not path.is_dir():
        if path.suffix != SUFFIX:
            raise CheckpointError(
                f"{path} is no {SUFFIX} file and no folder. Files of torch.save hold code: load them, and save them with"
                " safetensors"
            )
        tensors, metadata = _read_header(path)
        return Checkpoint(path, {path: metadata}, tensors, None, (), ())
    indices = sorted(path.glob(f"*{_INDEX}"))
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(indices) > 1 or (len(found) > 1 and not indices) or not found:
        listed = ", ".join(item.name for item in (*indices, *found)[:4]) or "none"
        raise CheckpointError(
            f"folder {path} does not hold one checkpoint: expected one {SUFFIX} file, or one *{_INDEX} with its files; found"
            f" {listed}"
        )
    index = indices[0] if indices else None
    names = _weight_map(index) if index else dict.fromkeys(_read_header(found[0])[0], found[0].name)
    files: dict[Path, dict[str, str]] = {}
    all_tensors: dict[str, Stored] = {}
    for file in (path / name for name in sorted(set(names.values()))):
        tensors, files[file] = _read_header(file)
        all_tensors |= tensors
    lost = [name for name, file in names.items() if name not in all_tensors or all_tensors[name].path.name != file]
    lost += [name for name in all_tensors if name not in names]
    if lost:
        raise CheckpointError(
            f"{index}: {lost[0]!r} is not where the index says ({len(lost)} such): index and files do not belong together"
        )
    rest = [item for item in sorted(path.iterdir()) if item not in files and item != index]
    other, left = (tuple(item for item in rest if item.is_file() == is_file) for is_file in (True, False))
    return Checkpoint(path, files, all_tensors, index, other, left)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text())
        names = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({type(error).__name__}: {error})") from error
    if any(Path(file).name != file for file in names.values()):
        raise CheckpointError(f"{index} names files outside its folder")
    return names
