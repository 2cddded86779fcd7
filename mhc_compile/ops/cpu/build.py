"""Compilation of this package's C++ by Inductor, which caches it for all processes."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

log = logging.getLogger(__name__)

#: Below this many tokens a second thread costs more than it gives.
_TOKENS_PER_THREAD = 512


@functools.cache
def library(headers: tuple[str, ...], **definitions: str | int) -> Any:
    """Compile headers with these macros; return None, with a warning, where that fails."""
    from mhc_compile._torch import load_cpp

    lines = [f"#define {name} {value}" for name, value in definitions.items()]
    folder = Path(__file__).parent
    source = "\n".join([*lines, *((folder / header).read_text().replace("#pragma once\n", "") for header in headers)])
    try:
        return load_cpp(source)
    except Exception as error:  # whatever a broken or missing compiler raises: the eager forms are always there
        log.warning("the CPU kernels could not be built, eager operations are used instead: %s", error)
        log.debug("building the CPU kernels failed", exc_info=True)
        return None


def threads_for(tokens: int) -> int:
    """Return the number of threads for this many tokens."""
    return max(1, min(torch.get_num_threads(), tokens // _TOKENS_PER_THREAD))


def _pointer(tensor: Tensor | list[Tensor] | None) -> Any:
    if isinstance(tensor, list):
        return (ctypes.c_void_p * len(tensor))(*(one.data_ptr() for one in tensor))
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(
    function: Any, tensors: Iterable[Tensor | list[Tensor] | None], integers: Iterable[int], *reals: float
) -> None:
    """Call a function of pointers, 64-bit integers and doubles.

    None and an empty tensor are null pointers, a list of tensors is an array of pointers.
    """
    function(
        *map(_pointer, tensors),
        *map(ctypes.c_int64, integers),
        *map(ctypes.c_double, reals),
    )
