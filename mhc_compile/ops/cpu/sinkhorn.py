"""Sinkhorn on CPU as one C++ kernel for all sites, shapes and iteration counts.

The eager form is some 90 small operations, each with an OpenMP barrier; here one parallel region
reads the logits once and writes the matrices once, sixteen tokens at a time, one in each lane of a
vector. Without a C++ compiler the eager form runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_compile.mappings import sinkhorn as eager
from mhc_compile.ops.cpu.build import call, library, threads_for

_LARGEST = 8
_REALS = {torch.float32: "float", torch.float64: "double"}


def _library(dtype: torch.dtype, streams: int, eps: float = 0.0) -> Any:
    if dtype not in _REALS or not 1 <= streams <= _LARGEST:
        return None
    definitions = {"COMPUTE": _REALS[dtype], "STREAMS": streams, "SINKHORN_EPS": repr(eps), "LAST_COLUMNS": 0}
    return library(("lanes.h", "sinkhorn.h", "alone.h"), **definitions)


def available(dtype: torch.dtype = torch.float32, streams: int = 4, eps: float = 0.0) -> bool:
    """Return whether a kernel for this dtype and number of streams can be built here."""
    return _library(dtype, streams, eps) is not None


def _run(direction: str, logits: Tensor, iterations: int, eps: float, *grads: Tensor) -> Tensor | None:
    n = logits.shape[-1]
    built = _library(logits.dtype, n, eps) if logits.numel() else None
    if built is None:
        return None
    tensors = [tensor.to(logits.dtype).contiguous() for tensor in (*grads, logits)]
    out = torch.empty_like(tensors[-1])
    tokens = logits.numel() // (n * n)
    call(getattr(built, f"mapping_{direction}"), (*tensors, out), (tokens, iterations, threads_for(tokens)))
    return out


def sinkhorn(logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn` for CPU tensors [..., n, n]."""
    out = _run("forward", logits, iterations, eps)
    return eager.sinkhorn(logits, iterations, eps).contiguous() if out is None else out


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn_backward` for CPU tensors [..., n, n]."""
    out = _run("backward", logits, iterations, eps, grad)
    return eager.sinkhorn_backward(grad, logits, iterations, eps).contiguous() if out is None else out
