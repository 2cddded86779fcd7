"""Residual mappings: the families from which H_res is taken. `registry` lists them."""

from mhc_compile.mappings.base import ResidualMapping
from mhc_compile.mappings.registry import MAPPINGS, columns, get_mapping, mapping_of, register_mapping
from mhc_compile.mappings.source_hash import code_of

__all__ = ["MAPPINGS", "ResidualMapping", "code_of", "columns", "get_mapping", "mapping_of", "register_mapping"]
