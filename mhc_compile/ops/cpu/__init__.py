"""Kernels for CPU, in C++ that Inductor's compiler builds: the headers of this folder.

A library is built for a combination of dtypes, number of streams and convention when it is first
needed, and serves all sites, shapes and iteration counts; Inductor's cache keeps it between
processes. Python calls its functions by a binding that takes tensors (`binding.h`): the operators
of eager mode (`operators`), and the code that Inductor writes (`lowering`).
"""

from mhc_compile.ops.cpu.kernels import (
    MAPPINGS,
    can_take,
    prepare,
    sinkhorn,
    sinkhorn_backward,
    takes,
    takes_lazy,
)
from mhc_compile.ops.cpu.operators import OPERATORS

__all__ = ["MAPPINGS", "OPERATORS", "can_take", "prepare", "sinkhorn", "sinkhorn_backward", "takes", "takes_lazy"]
