"""Residual mappings: the families from which H_res is taken.

A new one is one file and one line in `registry`.
"""

from __future__ import annotations

from mhc_compile.mappings.base import ResidualMapping
from mhc_compile.mappings.identity import Identity
from mhc_compile.mappings.kronecker import Kronecker
from mhc_compile.mappings.permutations import Permutations
from mhc_compile.mappings.registry import MAPPINGS, columns, get_mapping, mapping_of, register_mapping
from mhc_compile.mappings.sinkhorn import Sinkhorn
from mhc_compile.mappings.source_hash import code_of
from mhc_compile.mappings.unconstrained import Unconstrained

__all__ = [
    "MAPPINGS",
    "Identity",
    "Kronecker",
    "Permutations",
    "ResidualMapping",
    "Sinkhorn",
    "Unconstrained",
    "code_of",
    "columns",
    "get_mapping",
    "mapping_of",
    "register_mapping",
]
