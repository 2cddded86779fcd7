"""The hash of a mapping's code.

Compiled graphs are cached under the names of operators, which do not identify a mapping's code.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import pickle
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhc_compile.mappings.base import ResidualMapping

log = logging.getLogger(__name__)


def code_of(mapping: ResidualMapping) -> str:
    """Return a hash of the attributes of a mapping and the code of its classes.

    The code is the source of their modules, or byte code where there is no file.
    """
    digest = hashlib.sha256()
    for cls in type(mapping).__mro__:
        if cls.__module__.startswith("mhc_compile.mappings") or cls is object:
            continue  # hashed with the operators
        digest.update(cls.__qualname__.encode())
        try:
            digest.update(inspect.getsource(sys.modules[cls.__module__]).encode())
        except (OSError, TypeError, KeyError):
            for part in _code(cls, set()):
                digest.update(part)
    try:
        digest.update(pickle.dumps(vars(mapping)))
    except Exception:  # whatever a class raises that does not pickle: nothing is found in a cache then
        log.debug("%s cannot be pickled; compiled graphs are not cached", type(mapping).__name__, exc_info=True)
        digest.update(str(id(mapping)).encode())
    return digest.hexdigest()


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that code uses, also in nested functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _code(thing: Any, seen: set[int]) -> Iterator[bytes]:
    """Yield the byte code and constants of a class or function, and of its module's functions."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, type):
        for value in vars(thing).values():
            yield from _code(value, seen)
    elif isinstance(thing, staticmethod | classmethod | types.FunctionType):
        function: Any = getattr(thing, "__func__", thing)
        yield from _code(function.__code__, seen)
        for name in _names(function.__code__):
            called = function.__globals__.get(name)
            if isinstance(called, types.FunctionType) and called.__module__ == function.__module__:
                yield from _code(called, seen)
    elif isinstance(thing, types.CodeType):
        yield thing.co_code
        yield repr(thing.co_names).encode()
        for constant in thing.co_consts:
            yield from _code(constant, seen) if isinstance(constant, types.CodeType) else (repr(constant).encode(),)
    elif isinstance(thing, int | float | str | tuple):
        yield repr(thing).encode()
