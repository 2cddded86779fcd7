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
Gradients that are None are zero. Results are deterministic: what is added up in memory has a fixed
order. Launches: `update`, `mix_read`, `close` one, their backwards two; `read`, `step` and
`shifted_step` two, their backwards three.

Triton is optional. Without it this package still imports, `available()` is False, and the functions
do not exist. Not yet run on a GPU; checked with Triton's interpreter and compiled for sm_90.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from mhc_compile.config.coefficient_spec import parse

__all__ = [
    "available", "close", "close_backward", "mix_read", "mix_read_backward", "read", "read_backward", "reason",
    "shifted_step", "shifted_step_backward", "step", "step_backward", "takes", "update", "update_backward",
]  # fmt: skip

#: The oldest GPU for which the kernels are compiled: bfloat16 and tf32 are Ampere's.
_OLDEST = (8, 0)
#: Mappings that have kernels.
MAPPINGS = ("sinkhorn", "identity", "permutations", "kronecker", "unconstrained")


@functools.cache
def available() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def reason(device: torch.device) -> str | None:
    """Return why no kernel runs on a device, None where they do."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, not for {device.type}"
    if not available():
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "the kernels contain PTX, and this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return f"compute capability {capability[0]}.{capability[1]} is older than {wanted} (Ampere)"
    return None


def takes(streams: torch.dtype, branch: torch.dtype | None = None, mapping: str | None = None) -> bool:
    """Return whether there are kernels for these dtypes and this convention (None: any)."""
    if mapping is not None and (parse(mapping).mapping not in MAPPINGS or parse(mapping).rank):
        return False
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return available() and streams in narrow and (branch is None or branch in narrow)


if available():
    from .operators import (
        close,
        close_backward,
        mix_read,
        mix_read_backward,
        read,
        read_backward,
        shifted_step,
        shifted_step_backward,
        step,
        step_backward,
        update,
        update_backward,
    )
