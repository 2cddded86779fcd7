"""Compilation that starts from nothing and is paid for by neither side, so that the seconds of both can be compared."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["cold_cache", "warm_up"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def cold_cache(folder: Path) -> Iterator[None]:
    """Makes Inductor keep its cache in `folder`, empties it first, and removes it afterwards.

    In a cache that outlives the process one side may find what the other has to compile.
    """
    before = os.environ.get(_VARIABLE)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    os.environ[_VARIABLE] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
        shutil.rmtree(folder, ignore_errors=True)


def warm_up() -> None:
    """Compiles a function of one line and its backward: whoever is first pays for loading the compiler."""

    def line(x: torch.Tensor) -> torch.Tensor:
        return x.sin().sum()

    x = torch.ones(8, requires_grad=True)
    torch.compile(line)(x).backward()
