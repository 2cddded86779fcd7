"""The operators on CPU: one C++ kernel each, forward and backward.

A fused operator is one pass over the streams: a tile of 16 tokens stays in the cache while its new
streams are mixed, projected and collapsed. Per token and site at n = 4 that moves 10 C elements
forward and 15 C backward, the least that the formula allows. `shifted_step` and `mix_read` collapse
with weights that they are given, while the new streams are in registers: they need no cache for
that, and no first walk in the backward. Semantics, shapes, and the compositions that run for other
dtypes or without a C++ compiler: `mhc_compile.ops.fused_reference`.

The eager form of Sinkhorn is some 90 small operations, each with an OpenMP barrier. Its kernel
reads the logits once and writes the matrices once, a token in each lane of a vector.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.mappings import columns
from mhc_compile.mappings import sinkhorn as eager
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import reference
from mhc_compile.ops.cpu.build import call, library, threads_for
from mhc_compile.ops.lazy_reference import LONGEST
from mhc_compile.ops.norm_reference import NORMS, bound, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_HEADERS = ("vector.h", "lanes.h", "{mapping}.h", "projection.h", "norm.h", "step.h", "step_backward.h")
#: The rest of a library, without and with the lazy operators, which are a library of their own.
_REST = ("close.h", "exports.h"), ("lazy.h",)
#: Mappings that have a header of their name in this folder.
MAPPINGS = ("sinkhorn", "identity", "permutations", "kronecker", "unconstrained")
_REALS = {torch.float32: "float", torch.float64: "double"}
#: C++ types of streams and branch, and of what is computed.
_TYPES = {
    (torch.float32, torch.float32): ("float", "float", "float"),
    (torch.float32, torch.bfloat16): ("float", "mhc::Bfloat16", "float"),
    (torch.bfloat16, torch.bfloat16): ("mhc::Bfloat16", "mhc::Bfloat16", "float"),
    (torch.bfloat16, torch.float32): ("mhc::Bfloat16", "float", "float"),
    (torch.float64, torch.float64): ("double", "double", "double"),
}
#: Tensors that a kernel takes in the dtype of the streams. The branch has its own; all others are
#: what is computed.
AS_STREAMS = ("streams", "grad", "grad_streams", "grad_h")
_LARGEST = 8
#: A library that was built for dtypes and a number of streams, whatever its mapping.
_BUILT: dict[tuple[torch.dtype, torch.dtype, int, bool], Any] = {}
#: Held while a library is built, one for each kind: the thread of `prepare` and a first call may
#: want the same one.
_BUILDING = threading.Lock(), threading.Lock()


def _definitions(convention: Convention) -> dict[str, str | int]:
    """Return the macros that tell one convention's coefficients from another's."""
    # Settings that other mappings ignore make no new library.
    sinkhorn = convention if convention.mapping == "sinkhorn" else Convention()
    return {
        "PRE_EPS": repr(convention.pre_eps),
        "POST_RANGE": repr(float(convention.post_range)),
        "POST_EPS": repr(convention.post_eps),
        "SINKHORN_EPS": repr(sinkhorn.sinkhorn_eps),
        "LAST_COLUMNS": int(sinkhorn.last == "columns"),
        "GATE_SPEED": repr(float(convention.gate_speed)),
    }


def library_of(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str | None, *, lazy: bool = False) -> Any:
    """Return the library for a convention; with None any that is built, for kernels without one."""
    types = _TYPES.get((streams, branch))
    if types is None or not 1 <= n <= _LARGEST:
        return None
    if mapping is None:
        mapping = "sinkhorn"
        with _BUILDING[lazy]:
            if (streams, branch, n, lazy) in _BUILT:
                return _BUILT[streams, branch, n, lazy]
    convention = parse(mapping)
    if convention.mapping not in MAPPINGS or columns(convention.mapping, n) is None:
        return None
    store, other, compute = types
    headers = tuple(header.format(mapping=convention.mapping) for header in (*_HEADERS, *_REST[lazy]))
    macros = {**_definitions(convention), **({"MOST_BRANCHES": LONGEST["cpu"]} if lazy else {})}
    with _BUILDING[lazy]:
        built = library(headers, STORE=store, BRANCH=other, COMPUTE=compute, STREAMS=n, **macros)
        if built is not None:
            _BUILT.setdefault((streams, branch, n, lazy), built)
    return built


def takes(streams: torch.dtype, branch: torch.dtype | None = None, n: int = 4, mapping: str | None = None) -> bool:
    """Return whether a kernel for these dtypes, n streams and this convention can be built here.

    Without a mapping: a kernel that depends on none.
    """
    return library_of(streams, branch or streams, n, mapping) is not None


def can_take(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str | None = None) -> bool:
    """Return whether there is code for such dtypes, n streams and this convention, built or not."""
    known = mapping is None or parse(mapping).mapping in MAPPINGS
    return known and (streams, branch) in _TYPES and 1 <= n <= _LARGEST


def prepare(
    streams: torch.dtype, branch: torch.dtype, n: int, mapping: str, *, lazy: bool = False
) -> threading.Thread | None:
    """Build the kernels in a thread while the caller traces, which takes longer than the compiler.

    Returns the thread, None where there is nothing to build.
    """
    if not can_take(streams, branch, n, mapping):
        return None
    args = (streams, branch, n, mapping, lazy)
    thread = threading.Thread(target=_build, args=args, daemon=True, name="mhc-kernels")
    thread.start()
    return thread


def _build(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str, lazy: bool) -> None:
    try:
        library_of(streams, branch, n, mapping, lazy=lazy)
    except Exception:  # the call that needs the library builds it again, and raises where a user sees it
        log.debug("building the kernels ahead failed", exc_info=True)


def _kernel(module: Any, name: str) -> Callable[..., Any]:
    """Return an operator on CPU: its kernel, or where there is none the composition in `module`.

    A kernel takes the tensors of the composition in the same order, then the results. A backward
    has the forward's tensors as results.
    """
    composition = getattr(module, name)
    forward = getattr(module, name.removesuffix("_backward"))
    gradients = tensors_of(forward) if forward is not composition else []

    def run(*args: Any) -> Any:
        given = bound(composition, args)
        streams: Tensor = given["streams"]
        store, other = streams.dtype, given.get("branch", streams).dtype
        n = given["post"].shape[-1] if "post" in given else given["n"]
        built = library_of(store, other, n, given.get("mapping"))
        if given.pop("read_dtype", None) or built is None or not streams.numel():
            return reference.dense(getattr(module, name))(*args)
        compute = reference.compute_dtype(streams)
        dtypes = {**dict.fromkeys(AS_STREAMS, store), "branch": other}
        tensors: dict[str, Any] = {
            key: None if value is None else value.to(dtypes.get(key, compute)).contiguous()
            for key, value in given.items()
            if value is None or isinstance(value, Tensor)
        }
        likes = [tensors[key] for key in gradients]
        outs = [streams.new_empty(0) if like is None else torch.empty_like(like) for like in likes]
        if not likes:
            outs = fused.empty_results(name, streams, n, given.get("phi"), given.get("norm", ""))
        tokens = streams.shape[:-2].numel()
        sizes = (tokens, streams.shape[-1], streams.shape[-2], given.get("iterations", 1), threads_for(tokens))
        norm = NORMS.index(given.get("norm", ""))
        epsilons = given.get("eps", 0.0), given.get("norm_eps", 0.0)
        call(getattr(built, f"mhc_{name}"), (*tensors.values(), *outs), (*sizes, norm), *epsilons)
        if likes:
            wanted = (given[key] for key in gradients)
            return tuple(out if like is None else out.to(like.dtype) for out, like in zip(outs, wanted, strict=True))
        return tuple(outs) if len(outs) > 1 else outs[0]

    return run


read, read_backward = _kernel(fused, "read"), _kernel(fused, "read_backward")
step, step_backward = _kernel(fused, "step"), _kernel(fused, "step_backward")
shifted_step, shifted_step_backward = _kernel(fused, "shifted_step"), _kernel(fused, "shifted_step_backward")
mix_read, mix_read_backward = _kernel(fused, "mix_read"), _kernel(fused, "mix_read_backward")
close, close_backward = _kernel(fused, "close"), _kernel(fused, "close_backward")
update, update_backward = _kernel(reference, "update"), _kernel(reference, "update_backward")


def _sinkhorn(direction: str, logits: Tensor, iterations: int, eps: float, *grads: Tensor) -> Tensor | None:
    n = logits.shape[-1]
    if not logits.numel() or logits.dtype not in _REALS or not 1 <= n <= _LARGEST:
        return None
    macros = {"COMPUTE": _REALS[logits.dtype], "STREAMS": n, "SINKHORN_EPS": repr(eps), "LAST_COLUMNS": 0}
    built = library(("lanes.h", "sinkhorn.h", "alone.h"), **macros)
    if built is None:
        return None
    tensors = [tensor.to(logits.dtype).contiguous() for tensor in (*grads, logits)]
    out = torch.empty_like(tensors[-1])
    tokens = logits.numel() // (n * n)
    call(getattr(built, f"mapping_{direction}"), (*tensors, out), (tokens, iterations, threads_for(tokens)))
    return out


def sinkhorn(logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn` for CPU tensors [..., n, n]."""
    out = _sinkhorn("forward", logits, iterations, eps)
    return eager.sinkhorn(logits, iterations, eps).contiguous() if out is None else out


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn_backward` for CPU tensors [..., n, n]."""
    out = _sinkhorn("backward", logits, iterations, eps, grad)
    return eager.sinkhorn_backward(grad, logits, iterations, eps).contiguous() if out is None else out
