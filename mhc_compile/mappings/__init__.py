"""Residual mappings: the families from which H_res is taken. A new one is one file and one line here."""

from __future__ import annotations

from mhc_compile.errors import OptionError
from mhc_compile.mappings.base import Mapping
from mhc_compile.mappings.identity import Identity
from mhc_compile.mappings.sinkhorn import Sinkhorn

__all__ = ["MAPPINGS", "Identity", "Mapping", "Sinkhorn", "get_mapping"]

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
