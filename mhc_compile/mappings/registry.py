"""All mappings by name: those of this package, and those that a program adds."""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
import sys
import types
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.convention import MAPPING_NAMES, parse
from mhc_compile.errors import OptionError
from mhc_compile.mappings.base import Mapping
from mhc_compile.mappings.identity import Identity
from mhc_compile.mappings.kronecker import Kronecker
from mhc_compile.mappings.permutations import Permutations
from mhc_compile.mappings.sinkhorn import Sinkhorn
from mhc_compile.mappings.unconstrained import Unconstrained
from mhc_compile.options import MAX_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["MAPPINGS", "code_of", "columns", "get_mapping", "mapping_of", "register_mapping"]

_OURS = (Sinkhorn(), Identity(), Permutations(), Kronecker(), Unconstrained())
MAPPINGS: dict[str, Mapping] = {mapping.name: mapping for mapping in _OURS}


def get_mapping(name: str) -> Mapping:
    """The mapping registered under `name`.

    Raises:
        OptionError: no such mapping.
    """
    try:
        return MAPPINGS[name]
    except KeyError:
        raise OptionError(f"mapping {name!r} is unknown; known: {', '.join(sorted(MAPPINGS))}") from None


@functools.cache
def _sinkhorn(eps: float, last: str) -> Sinkhorn:
    return Sinkhorn(eps, last)


def mapping_of(spec: str) -> Mapping:
    """The mapping of a convention that is given as a string, with the convention's settings (see `mhc_compile.convention`).

    Raises:
        OptionError: no such mapping, or no such setting.
    """
    convention = parse(spec)
    if convention.mapping == "sinkhorn":
        return _sinkhorn(convention.sinkhorn_eps, convention.last)
    return get_mapping(convention.mapping)


def columns(name: str, n: int) -> int | None:
    """K, the columns of phi for n streams under a mapping: 2 n and its logits. None where the mapping does not have n streams."""
    mapping = get_mapping(name)
    try:
        mapping.check(n)
    except OptionError:
        return None
    return 2 * n + mapping.logits(n)


def register_mapping(mapping: Mapping) -> None:
    """Makes a mapping known, so that `options={"mapping": mapping.name}` finds it. See `examples/own_mapping.py`.

    A name that is taken is refused, unless by an earlier version of the same class, as when a cell of a notebook runs again. Graphs that were
    compiled before keep what they were compiled with. Compiled code that a cache on disk holds is found again only while the code of the class,
    of its module, and the attributes of the object are the same.

    Args:
        mapping: an object of a subclass of `mhc_compile.Mapping`.

    Raises:
        OptionError: the name is taken or is no word, or what the mapping gives does not fit together.
    """
    if not isinstance(mapping, Mapping):
        raise OptionError(
            f"register_mapping takes an object of a subclass of mhc_compile.Mapping, got {mapping!r} ({type(mapping).__name__})"
        )
    name = getattr(mapping, "name", None)
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise OptionError(
            f"{type(mapping).__name__}.name is {name!r}; expected a word of letters, digits, '-' and '_', such as 'my-mapping'"
        )
    known = MAPPINGS.get(name)
    if known is not None and (known in _OURS or _place(known) != _place(mapping)):
        raise OptionError(f"mapping {name!r} is taken by {_place(known)}; give {_place(mapping)} another name")
    sizes = [n for n in range(1, MAX_STREAMS + 1) if _has(mapping, n)]
    if not sizes:
        raise OptionError(f"mapping {name!r}: check(n) refuses every number of streams from 1 to {MAX_STREAMS}")
    for n in sizes:
        _try(mapping, n)
    MAPPINGS[name] = mapping
    if name not in MAPPING_NAMES:
        MAPPING_NAMES.append(name)


def _place(mapping: Mapping) -> str:
    return f"{type(mapping).__module__}.{type(mapping).__qualname__}"


def _has(mapping: Mapping, n: int) -> bool:
    try:
        mapping.check(n)
    except OptionError:
        return False
    return True


@torch.no_grad()
def _try(mapping: Mapping, n: int) -> None:
    """Holds the start of `mapping` for n streams against what every start must be."""
    what = f"mapping {mapping.name!r}, {n} streams"
    logits = mapping.logits(n)
    if isinstance(logits, bool) or not isinstance(logits, int) or logits < 0:
        raise OptionError(f"{what}: logits(n) is {logits!r}; expected how many there are, an integer")
    for method in ("start", "scratch"):
        vector = getattr(mapping, method)(n)
        if not isinstance(vector, torch.Tensor) or tuple(vector.shape) != (logits,):
            shown = list(vector.shape) if isinstance(vector, torch.Tensor) else repr(vector)
            raise OptionError(f"{what}: {method}(n) is {shown}; expected a tensor [{logits}], as logits(n) is {logits}")
    matrix = mapping.matrix(mapping.start(n).double().expand(2, 3, logits), n, 20)
    if tuple(matrix.shape) != (2, 3, n, n):
        raise OptionError(f"{what}: matrix(logits [2, 3, {logits}]) is {list(matrix.shape)}; expected [2, 3, {n}, {n}]")
    sums = matrix.sum(-1)
    if not bool((sums - 1).abs().max() < 1e-4):
        raise OptionError(
            f"{what}: the rows of matrix(start(n)) sum to {[round(x, 4) for x in sums[0, 0].tolist()]}; expected 1 each, so that a model that"
            " starts with it computes what it did before"
        )
    _try_backward(mapping, n, logits)


def _try_backward(mapping: Mapping, n: int, logits: int) -> None:
    """Holds `backward` against autograd through `matrix`: a subclass that changes one may have inherited the other."""
    what = f"mapping {mapping.name!r}, {n} streams"
    generator = torch.Generator().manual_seed(0)
    given = mapping.start(n).double() + torch.randn(3, logits, dtype=torch.float64, generator=generator)
    grad = torch.randn(3, n, n, dtype=torch.float64, generator=generator)
    with torch.enable_grad():
        leaf = given.requires_grad_()
        matrix = mapping.matrix(leaf, n, 3)
        want = (
            torch.autograd.grad((matrix * grad).sum(), leaf, materialize_grads=True)[0]
            if matrix.requires_grad
            else torch.zeros_like(given)
        )
    try:
        got = mapping.backward(grad, given.detach(), n, 3)
    except Exception as error:
        raise OptionError(f"{what}: backward failed: {error}") from error
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-6, atol=1e-9):
        raise OptionError(
            f"{what}: backward is not the gradient of matrix (they differ by up to {_difference(got, want)}); override `backward` where `matrix`"
            " is overridden, or derive from mhc_compile.Mapping, which differentiates"
        )


def _difference(one: Tensor, other: Tensor) -> str:
    return (
        f"{float((one - other).abs().max()):.1e}"
        if one.shape == other.shape
        else f"shape, {list(one.shape)} and {list(other.shape)}"
    )


def code_of(mapping: Mapping) -> str:
    """A hash of what a registered mapping computes: the modules of its classes, or their code where there is no file, and its attributes."""
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
        digest.update(str(id(mapping)).encode())
    return digest.hexdigest()


def _code(thing: Any, seen: set[int]) -> Iterator[bytes]:
    """The byte code and constants of a class or a function, and of functions of the same module that it calls."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, type):
        for value in vars(thing).values():
            yield from _code(value, seen)
    elif isinstance(thing, staticmethod | classmethod | types.FunctionType):
        function: Any = getattr(thing, "__func__", thing)
        yield from _code(function.__code__, seen)
        for name in function.__code__.co_names:
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
