"""Checkpoints of the systems that ship hyper-connections, exchanged with ours.

layout, layouts/     what a system's files look like, as values
reading, writing     from names and shapes to a plan, in either direction
entries, sizes       one site's parameters against a layout, and shapes in letters
tensors              one parameter in its other layout
states               state dicts and models
files, convert       safetensors files, tensor by tensor (`mhc convert`)
"""

from __future__ import annotations

from mhc_compile.interop.layout import Entry, Layout, Part, Spelling
from mhc_compile.interop.layouts import LAYOUTS, get_layout, register_layout
from mhc_compile.interop.reading import fitting, plan_from_native
from mhc_compile.interop.states import export_state_dict, from_native, import_state_dict, to_native
from mhc_compile.interop.writing import plan_to_native

__all__ = [
    "LAYOUTS",
    "Entry",
    "Layout",
    "Part",
    "Spelling",
    "export_state_dict",
    "fitting",
    "from_native",
    "get_layout",
    "import_state_dict",
    "plan_from_native",
    "plan_to_native",
    "register_layout",
    "to_native",
]
