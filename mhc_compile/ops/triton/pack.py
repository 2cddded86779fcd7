"""phi in two bfloat16 halves, made once a launch of the forward kernel: its programs would otherwise each split the whole of phi again.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import split

__all__ = ["pack_kernel"]


@triton.jit
def pack_kernel(phi, packed, size, columns: tl.constexpr, stride: tl.constexpr, block: tl.constexpr):
    """`phi` [R, K], `size` = R K numbers, to `packed` [R, stride] bfloat16: K coarse halves, then K fine ones. The rest of a row stays as it is."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    to = (at // columns) * stride + at % columns
    coarse, fine = split(tl.load(phi + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(packed + to, coarse, mask=inside)
    tl.store(packed + to + columns, fine, mask=inside)
