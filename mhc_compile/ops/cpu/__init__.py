"""Kernels for CPU, in C++ that Inductor's compiler builds: the headers of this folder.

A library is built for a combination of dtypes, number of streams and convention when it is first
needed, and serves all sites, shapes and iteration counts; Inductor's cache keeps it between
processes.
"""

from mhc_compile.ops.cpu import lazy
from mhc_compile.ops.cpu.kernels import (
    MAPPINGS,
    can_take,
    close,
    close_backward,
    mix_read,
    mix_read_backward,
    prepare,
    read,
    read_backward,
    shifted_step,
    shifted_step_backward,
    sinkhorn,
    sinkhorn_backward,
    step,
    step_backward,
    takes,
    update,
    update_backward,
)

__all__ = [
    "MAPPINGS", "can_take", "close", "close_backward", "lazy", "mix_read", "mix_read_backward", "prepare", "read",
    "read_backward", "shifted_step", "shifted_step_backward", "sinkhorn", "sinkhorn_backward", "step", "step_backward",
    "takes", "update", "update_backward",
]  # fmt: skip
