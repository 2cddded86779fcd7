"""The fused operators of a site as Triton kernels for CUDA.

Shapes, with `...` any token axes (T tokens in all), n streams of width C, and m = n, or m = 1 for n
equal streams of which one is held:

    streams           [..., m, C]   float32, bfloat16 or float16
    branch            [..., C]      any floating dtype
    pre, post         [..., n]      float32
    res               [..., n, n]   float32; res[..., i, j]: weight of old stream j in new stream i
    phi, bias, scale  [n C, K], [K], [3]; K = 2 n + the logits of the mapping
    z, inverse        [..., K], [..., 1]   float32: the projection, already divided, and 1 / rms
    gain, shift       [C]           of the norm of h ("rms" or "layer"), any floating dtype, or None
    moments           [..., 2]      float32: the mean that was subtracted, and the factor

Source of the equations: arXiv 2512.24880 v2, section 4; convention: `mhc_compile.ops.reference`.
Gradients that are None are zero. Results are deterministic: what is added up in memory has a fixed
order. Launches: `update`, `mix_read`, `close` one, their backwards two; `read`, `step` and
`shifted_step` two, their backwards three.

Triton is optional. Without it this package still imports, `available()` is False, and the functions
do not exist. Not yet run on a GPU; checked with Triton's interpreter and compiled for sm_90.
"""

from __future__ import annotations

from .coverage import available, reason, takes

__all__ = [
    "available", "close", "close_backward", "lazy_step", "lazy_step_backward", "mix_read", "mix_read_backward", "read", "read_backward", "reason",
    "shifted_step", "shifted_step_backward", "step", "step_backward", "takes", "update", "update_backward",
]  # fmt: skip

if available():
    from .mixing_operators import close, close_backward, mix_read, mix_read_backward, update, update_backward
    from .operators import (
        lazy_step,
        lazy_step_backward,
        read,
        read_backward,
        shifted_step,
        shifted_step_backward,
        step,
        step_backward,
    )
