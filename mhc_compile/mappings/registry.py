"""All mappings by name: those of this package, and those that a program adds."""

from __future__ import annotations

import functools

from mhc_compile.config.coefficient_spec import STREAM_COUNTS, parse
from mhc_compile.errors import OptionError
from mhc_compile.mappings.base import ResidualMapping
from mhc_compile.mappings.identity import Identity
from mhc_compile.mappings.kronecker import Kronecker
from mhc_compile.mappings.permutations import Permutations
from mhc_compile.mappings.sinkhorn import Sinkhorn
from mhc_compile.mappings.unconstrained import Unconstrained
from mhc_compile.mappings.validation import validate_mapping

__all__ = ["MAPPINGS", "columns", "get_mapping", "mapping_of", "register_mapping"]

_OURS = (Sinkhorn(), Identity(), Permutations(), Kronecker(), Unconstrained())
MAPPINGS: dict[str, ResidualMapping] = {mapping.name: mapping for mapping in _OURS}


def get_mapping(name: str) -> ResidualMapping:
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


def mapping_of(spec: str) -> ResidualMapping:
    """The mapping of a convention that is given as a string, with the convention's settings (see `mhc_compile.config.coefficient_spec`).

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


def register_mapping(mapping: ResidualMapping) -> None:
    """Makes a mapping known, so that `options={"mapping": mapping.name}` finds it. See `examples/configuration/own_mapping.py`.

    A name that is taken is rejected, unless by an earlier version of the same class, as when a cell
    of a notebook runs again. Graphs that were compiled before keep what they were compiled with.
    Compiled code that a cache on disk holds is found again only while the code of the class, of its
    module, and the attributes of the object are the same.

    Args:
        mapping: an object of a subclass of `mhc_compile.ResidualMapping`.

    Raises:
        OptionError: the name is taken or is no word, or what the mapping gives does not fit
            together.
    """
    if not isinstance(mapping, ResidualMapping):
        raise OptionError(
            f"register_mapping takes an object of a subclass of mhc_compile.ResidualMapping, got {mapping!r} ({type(mapping).__name__})"
        )
    name = getattr(mapping, "name", None)
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise OptionError(
            f"{type(mapping).__name__}.name is {name!r}; expected a word of letters, digits, '-' and '_', such as 'my-mapping'"
        )
    known = MAPPINGS.get(name)
    if known is not None and (known in _OURS or _place(known) != _place(mapping)):
        raise OptionError(f"mapping {name!r} is taken by {_place(known)}; give {_place(mapping)} another name")
    STREAM_COUNTS[name] = validate_mapping(mapping)
    MAPPINGS[name] = mapping


def _place(mapping: ResidualMapping) -> str:
    return f"{type(mapping).__module__}.{type(mapping).__qualname__}"
