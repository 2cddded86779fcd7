"""Exchange checkpoints with the systems that ship hyper-connections.

layout, layouts    names and shapes of one system's parameters, as data
plan               what becomes of every entry, and the tensor operations
planner            from names and shapes to a plan, in either direction
state_dicts        state dicts and models
safetensors_io     safetensors files and folders, tensor by tensor
convert            files and folders, for `mhc convert`
"""

from mhc_compile.interop.state_dicts import export_state_dict, from_native, import_state_dict, to_native

__all__ = ["export_state_dict", "from_native", "import_state_dict", "to_native"]
