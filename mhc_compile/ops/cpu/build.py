"""Compilation of this package's C++ by Inductor, which caches it for all processes."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

#: Below this many tokens a second thread costs more than it gives.
_TOKENS_PER_THREAD = 512


@functools.cache
def library(headers: tuple[str, ...], **definitions: str | int) -> Any:
    """Compile headers with these macros; return None, with a warning, where that fails."""
    from mhc_compile._torch import load_cpp

    lines = [f"#define {name} {value}" for name, value in definitions.items()]
    source = "\n".join([*lines, *map(_text, ("packed.h", *headers))])
    try:
        return Kernels(load_cpp(source), _binder())
    except Exception as error:  # whatever a broken or missing compiler raises: the eager forms are always there
        log.warning("the CPU kernels could not be built, eager operations are used instead: %s", error)
        log.debug("building the CPU kernels failed", exc_info=True)
        return None


def _text(header: str) -> str:
    return (Path(__file__).parent / header).read_text().replace("#pragma once\n", "")


@functools.cache
def _binder() -> Callable[[int], Callable[..., None]]:
    """Return what makes a Python function of the address of a packed function (binding.h)."""
    from mhc_compile._torch import load_cpp, tensor_address_function

    loaded = load_cpp(_text("binding.h"))
    bind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p)(_address(loaded.mhc_bind))
    address_of = tensor_address_function()
    return lambda function: bind(function, address_of)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Kernels:
    """The functions of a library by name, to be called as `function(*tensors, *integers, *reals)`.

    An empty tensor or None is a null pointer, a list of tensors an array of pointers. Tensors must
    be contiguous and have the dtypes of the library, which are not checked.
    """

    def __init__(self, loaded: Any, bind: Callable[[int], Callable[..., None]]) -> None:
        self._loaded, self._bind = loaded, bind

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = self._bind(_address(getattr(self._loaded, f"{name}_packed")))
        setattr(self, name, function)
        return function


def threads_for(tokens: int) -> int:
    """Return the number of threads for this many tokens."""
    return max(1, min(torch.get_num_threads(), tokens // _TOKENS_PER_THREAD))
