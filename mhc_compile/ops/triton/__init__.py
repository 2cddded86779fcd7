"""The fused operators of a site as Triton kernels for CUDA.

Shapes, with `...` any token axes (T tokens in all), n streams of width C, and m = n, or m = 1 for n
equal streams of which one is held:

    streams           [..., m, C]   float32, bfloat16 or float16
    branch            [..., C]      any floating dtype
    pre, post         [..., n]      float32
    res               [..., n, n]   float32; res[..., i, j]: weight of old stream j in new stream i
    phi, bias, scale  [n C, K], [K], [3]; K = n² + 2 n for "sinkhorn", 2 n for "identity"
    z, inverse        [..., K], [..., 1]   float32: the projection, already divided, and 1 / rms

Source of the equations: arXiv 2512.24880 v2, section 4; convention: `mhc_compile.ops.reference`.
Gradients that are None are zero. Results are deterministic: there are no atomics. Launches:
`update`, `close` one; `read`, `step` one, and one more for bfloat16 streams; `update_backward`,
`close_backward` two; `read_backward` four, `step_backward` five.

Triton is optional. Without it this package still imports, `available()` is False, and the functions
do not exist. Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = [
    "available", "close", "close_backward", "read", "read_backward", "step", "step_backward", "takes", "update",
    "update_backward",
]  # fmt: skip


@functools.cache
def available() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def takes(streams: torch.dtype, branch: torch.dtype | None = None, mapping: str | None = None) -> bool:
    """Return whether there are kernels for these dtypes and this convention (None: any)."""
    if mapping not in (None, "sinkhorn", "identity"):
        return False
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return available() and streams in narrow and (branch is None or branch in narrow)


if available():
    from .operators import close, close_backward, read, read_backward, step, step_backward, update, update_backward
