"""The fused operators of a site on CUDA: importing this module needs Triton.

Shapes, with `...` any token axes (T tokens in all), n streams of width C, and m = n, or m = 1 for n equal streams of which one is held:

    streams           [..., m, C]   float32, bfloat16 or float16
    branch            [..., C]      any floating dtype
    pre, post         [..., n]      float32
    res               [..., n, n]   float32; res[..., i, j] is the weight of old stream j in new stream i
    phi, bias, scale  [n C, K], [K], [3]; K = n² + 2 n for "sinkhorn", 2 n for "identity"
    z, inverse        [..., K], [..., 1]   float32: the projection, already divided, and 1 / rms

Source of the equations: arXiv 2512.24880 v2, section 4; the convention is that of `mhc_compile.ops.reference`. Gradients that are `None` are zero.
Launches: `update`, `close` one; `read`, `step` one, and one more for bfloat16 streams; `update_backward`, `close_backward` two;
`read_backward` four, `step_backward` five.
Results are deterministic: there are no atomics.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

from ._sites import read, read_backward, step, step_backward
from ._updates import close, close_backward, update, update_backward

__all__ = ["close", "close_backward", "read", "read_backward", "step", "step_backward", "update", "update_backward"]
