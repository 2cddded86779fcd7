"""The libraries of kernels for CPU, one for each combination of dtypes, streams and convention.

The eager form of Sinkhorn is some 90 small operations, each with an OpenMP barrier. Its kernel
reads the logits once and writes the matrices once, a token in each lane of a vector.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.errors import MhcError
from mhc_compile.mappings import columns
from mhc_compile.mappings import sinkhorn as eager
from mhc_compile.ops.cpu.build import library, threads_for
from mhc_compile.ops.lazy_reference import LONGEST

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_HEADERS = ("vector.h", "lanes.h", "{mapping}.h", "projection.h", "norm.h", "step.h", "step_backward.h")
#: The rest of a library, without and with the lazy operators, which are a library of their own.
_REST = ("close.h", "exports.h"), ("lazy.h",)
#: Mappings that have a header of their name in this folder.
MAPPINGS = ("sinkhorn", "identity", "permutations", "kronecker", "unconstrained")
_REALS = {torch.float32: "float", torch.float64: "double"}
_NAMES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "mhc::Bfloat16",
    torch.float16: "mhc::Float16",
}
#: C++ types of streams and branch, and of what is computed.
_TYPES = {
    (streams, branch): (_NAMES[streams], _NAMES[branch], "float")
    for half in (torch.bfloat16, torch.float16)
    for streams in (torch.float32, half)
    for branch in (torch.float32, half)
} | {(torch.float64, torch.float64): ("double", "double", "double")}
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
        "SCALE_SPEED": repr(float(convention.scale_speed)),
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


def takes_lazy(streams: Tensor, branches: list[Tensor], n: int, mapping: str | None) -> bool:
    """Return whether there is a lazy kernel for these branch outputs, all of one dtype."""
    if len({branch.dtype for branch in branches}) > 1 or len(branches) > LONGEST["cpu"]:
        return False
    return library_of(streams.dtype, branches[0].dtype, n, mapping, lazy=True) is not None


@functools.cache
def function(
    name: str, streams: torch.dtype, branch: torch.dtype, n: int, mapping: str | None, lazy: bool
) -> Callable[..., None]:
    """Return the kernel of an operator: a function of tensors, integers, threads and reals.

    Raises:
        MhcError: it cannot be built here.
    """
    built = library_of(streams, branch, n, mapping, lazy=lazy)
    if built is None:
        raise MhcError(f"the CPU kernel mhc::{name}, which compiled code calls, cannot be built here: see `mhc doctor`")
    return getattr(built, f"mhc_{name}")  # type: ignore[no-any-return]


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
    getattr(built, f"mapping_{direction}")(*tensors, out, tokens, iterations, threads_for(tokens))
    return out


def sinkhorn(logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn` for CPU tensors [..., n, n]."""
    out = _sinkhorn("forward", logits, iterations, eps)
    return eager.sinkhorn(logits, iterations, eps).contiguous() if out is None else out


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Compute `mhc_compile.mappings.sinkhorn.sinkhorn_backward` for CPU tensors [..., n, n]."""
    out = _sinkhorn("backward", logits, iterations, eps, grad)
    return eager.sinkhorn_backward(grad, logits, iterations, eps).contiguous() if out is None else out
