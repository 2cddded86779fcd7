"""Where the Triton kernels run, and for which tensors."""

from __future__ import annotations

import functools
import importlib.util

import torch

from mhc_compile.config.coefficient_spec import parse

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
