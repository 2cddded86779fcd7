"""Safetensors files, read and written tensor by tensor: what is not converted is copied byte by byte, whatever its dtype.

Format: 8 bytes, the length of the header; the header, JSON of {name: {"dtype", "shape", "data_offsets"}} and "__metadata__"; the tensors.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["Stored", "Written", "read", "read_header", "write", "written"]

#: The dtypes that parameters of hyper-connections may have.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24
_METADATA = "__metadata__"
#: The longest header that the safetensors library reads.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are, from `start` up to `stop`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, some at a time."""
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
    """A tensor to be written."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterator[bytes]]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, in the order in which their bytes stand there, and its metadata.

    Raises:
        CheckpointError: it is no safetensors file, or has been cut off.
    """
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
    """The tensor itself; of one of the dtypes that parameters of hyper-connections have."""
    data = bytearray().join(stored.chunks())
    return torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).reshape(stored.shape)


def written(dtype: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Written:
    """A tensor that is made when its turn comes.

    Raises:
        CheckpointError: its dtype is none that parameters of hyper-connections have.
    """
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
    """Writes a file of `tensors`, in this order, and returns its size in bytes.

    Raises:
        CheckpointError: the file cannot be written.
    """
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
