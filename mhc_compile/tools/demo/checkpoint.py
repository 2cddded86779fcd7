"""A run on disk: written in one piece, read without running code, and rejected with a sentence where it does not fit."""

from __future__ import annotations

import os
import pickle
import platform
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT", "NAME", "conditions", "load", "save"]

#: First entry of every checkpoint; changes with its layout.
FORMAT = "mhc demo checkpoint 1"
#: Name of the file in the output folder.
NAME = "checkpoint.pt"
_KEYS = {"format", "settings", "digest", "target", "conditions", "run"}


def conditions() -> dict[str, Any]:
    """What bit-for-bit continuation needs besides the settings: versions, and how many threads share a sum."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "threads": torch.get_num_threads(),
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`: all of it or nothing. Whoever is killed meanwhile leaves the previous checkpoint.

    Args:
        path: of the file; its folder exists.
        content: tensors and plain data under the keys settings, digest, target, conditions and run.

    Raises:
        MhcError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MhcError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote.

    Raises:
        MhcError: there is none at `path`, it cannot be read, or it is something else.
    """
    if not path.exists():
        raise MhcError(
            f"there is no checkpoint {path} to resume. Leave --resume out to start a run,"
            " or name another folder with --out"
        )
    way_out = "Leave --resume out to start afresh, or name another folder with --out"
    try:
        content = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise MhcError(
            f"the checkpoint {path} ({path.stat().st_size} bytes) is damaged: {reason}. {way_out}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= _KEYS:
        found = content.get("format", "none") if isinstance(content, dict) else type(content).__name__
        raise MhcError(f"{path} is no checkpoint of this demo: its format is {found!r}, expected {FORMAT!r}. {way_out}")
    return content
