"""All mappings by name: those of this package and registered ones."""

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

_OURS = (Sinkhorn(), Identity(), Permutations(), Kronecker(), Unconstrained())
MAPPINGS: dict[str, ResidualMapping] = {mapping.name: mapping for mapping in _OURS}


def get_mapping(name: str) -> ResidualMapping:
    """Return the mapping registered under `name`.

    Raises:
        OptionError: no such mapping.
    """
    try:
        return MAPPINGS[name]
    except KeyError:
        raise OptionError(f"mapping {name!r} is unknown; known: {', '.join(sorted(MAPPINGS))}") from None


_sinkhorn = functools.cache(Sinkhorn)


def mapping_of(spec: str) -> ResidualMapping:
    """Return the mapping of a convention (see `mhc_compile.config.coefficient_spec`).

    Raises:
        OptionError: an unknown mapping or setting.
    """
    convention = parse(spec)
    if convention.mapping == "sinkhorn":
        return _sinkhorn(convention.sinkhorn_eps, convention.last)
    return get_mapping(convention.mapping)


def columns(name: str, n: int) -> int | None:
    """Return K, the columns of phi for n streams; None if the mapping does not support n."""
    mapping = get_mapping(name)
    return 2 * n + mapping.logits(n) if n in STREAM_COUNTS[name] else None


def register_mapping(mapping: ResidualMapping) -> None:
    """Register a mapping for `options={"mapping": mapping.name}`.

    A later version of the same class replaces an earlier one, as when a cell of a notebook runs
    again; graphs that were compiled before do not change. A cache of compiled code on disk is valid
    while the code of the class, of its module, and the attributes of the object are the same.
    `examples/configuration/own_mapping.py` shows a whole mapping.

    Args:
        mapping: an object of a subclass of `mhc_compile.ResidualMapping`.

    Raises:
        OptionError: the name is taken or no word, or the methods contradict each other.
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
