"""Residual mappings: the families from which H_res is taken. A new one is one file and one line here."""

from __future__ import annotations

import functools

from mhc_compile.convention import parse
from mhc_compile.errors import OptionError
from mhc_compile.mappings.base import Mapping
from mhc_compile.mappings.identity import Identity
from mhc_compile.mappings.sinkhorn import Sinkhorn

__all__ = ["MAPPINGS", "Identity", "Mapping", "Sinkhorn", "get_mapping", "mapping_of"]

MAPPINGS: dict[str, Mapping] = {mapping.name: mapping for mapping in (Sinkhorn(), Identity())}


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
