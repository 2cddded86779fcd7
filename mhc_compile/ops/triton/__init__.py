"""The fused operators of a site as Triton kernels for CUDA. Names, arguments and shapes: `mhc_compile.ops.triton.kernels`.

Triton is optional. Without it this package still imports, `available()` says so, and the functions do not exist.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = [
    "available",
    "close",
    "close_backward",
    "read",
    "read_backward",
    "step",
    "step_backward",
    "takes",
    "update",
    "update_backward",
]


@functools.cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def takes(streams: torch.dtype, branch: torch.dtype | None = None, mapping: str | None = None) -> bool:
    """Whether there are kernels for streams and a branch of these dtypes, and for this mapping in the paper's convention (None: any)."""
    if mapping not in (None, "sinkhorn", "identity"):
        return False
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return available() and streams in narrow and (branch is None or branch in narrow)


if available():
    from .kernels import close, close_backward, read, read_backward, step, step_backward, update, update_backward
