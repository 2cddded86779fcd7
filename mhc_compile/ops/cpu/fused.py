"""The fused operators on CPU: one C++ kernel each, forward and backward, that passes over the streams once.

A tile of 16 tokens stays in the cache while its new streams are mixed, projected and collapsed. Per token and site at n = 4 that moves 10 C
elements forward and 15 C backward, the least that the formula allows; the projection and the mapping are part of the pass. Semantics, shapes, and the
forms that run for other dtypes or where there is no C++ compiler: `mhc_compile.ops.fused_reference`.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.mappings import columns
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import reference
from mhc_compile.ops.cpu.build import call, library, threads_for

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "MAPPINGS",
    "close",
    "close_backward",
    "prepare",
    "read",
    "read_backward",
    "step",
    "step_backward",
    "takes",
    "update",
    "update_backward",
]

log = logging.getLogger(__name__)

_HEADERS = ("vector.h", "lanes.h", "{mapping}.h", "projection.h", "step.h", "step_backward.h", "close.h", "exports.h")
#: Mappings that have a header of their name in this folder.
MAPPINGS = ("sinkhorn", "identity", "permutations", "kronecker", "unconstrained")
#: C++ types of streams and branch, and of what is computed.
_TYPES = {
    (torch.float32, torch.float32): ("float", "float", "float"),
    (torch.float32, torch.bfloat16): ("float", "mhc::Bfloat16", "float"),
    (torch.bfloat16, torch.bfloat16): ("mhc::Bfloat16", "mhc::Bfloat16", "float"),
    (torch.bfloat16, torch.float32): ("mhc::Bfloat16", "float", "float"),
    (torch.float64, torch.float64): ("double", "double", "double"),
}
_LARGEST = 8


#: A library that was built for dtypes and a number of streams, whatever its mapping.
_BUILT: dict[tuple[torch.dtype, torch.dtype, int], Any] = {}
#: Held while a library is built: the thread of `prepare` and the first call of a kernel may want the same one.
_BUILDING = threading.Lock()


def _definitions(convention: Convention) -> dict[str, str | int]:
    """The macros that tell one convention's coefficients from another's."""
    sinkhorn = (
        convention if convention.mapping == "sinkhorn" else Convention()
    )  # what others ignore makes no new library
    return {
        "PRE_EPS": repr(convention.pre_eps),
        "POST_RANGE": repr(float(convention.post_range)),
        "POST_EPS": repr(convention.post_eps),
        "SINKHORN_EPS": repr(sinkhorn.sinkhorn_eps),
        "LAST_COLUMNS": int(sinkhorn.last == "columns"),
    }


def _library(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str | None) -> Any:
    """The library for a mapping or convention; with None whichever there is, for what depends on none."""
    types = _TYPES.get((streams, branch))
    if types is None or not 1 <= n <= _LARGEST:
        return None
    if mapping is None:
        mapping = "sinkhorn"
        with _BUILDING:
            if (streams, branch, n) in _BUILT:
                return _BUILT[streams, branch, n]
    convention = parse(mapping)
    if convention.mapping not in MAPPINGS or columns(convention.mapping, n) is None:
        return None
    store, other, compute = types
    headers = tuple(header.format(mapping=convention.mapping) for header in _HEADERS)
    with _BUILDING:
        built = library(headers, STORE=store, BRANCH=other, COMPUTE=compute, STREAMS=n, **_definitions(convention))
        if built is not None:
            _BUILT.setdefault((streams, branch, n), built)
    return built


def takes(streams: torch.dtype, branch: torch.dtype | None = None, n: int = 4, mapping: str | None = None) -> bool:
    """Whether there is a kernel for these dtypes, this number of streams and this mapping or convention, and a compiler that builds it here.

    Without a mapping: for what depends on none.
    """
    return _library(streams, branch or streams, n, mapping) is not None


def prepare(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str) -> threading.Thread | None:
    """Begin to build the kernels while the caller goes on: tracing takes longer than the C++ compiler does.

    Returns the thread, None where there is nothing to build.
    """
    if (streams, branch) not in _TYPES or not 1 <= n <= _LARGEST or parse(mapping).mapping not in MAPPINGS:
        return None
    thread = threading.Thread(target=_build, args=(streams, branch, n, mapping), daemon=True, name="mhc-kernels")
    thread.start()
    return thread


def _build(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str) -> None:
    try:
        _library(streams, branch, n, mapping)
    except Exception:  # the call that needs the library builds it again, and raises where a user sees it
        log.debug("building the kernels ahead failed", exc_info=True)


class _Call:
    """One call of a kernel: its library, its sizes, and its tensors made dense and of the dtype that is computed in."""

    def __init__(self, streams: Tensor, branch: Tensor | None, n: int, mapping: str | None, iterations: int) -> None:
        self.library = _library(streams.dtype, streams.dtype if branch is None else branch.dtype, n, mapping)
        self.dtype = reference.compute_dtype(streams)
        self.tokens, self.width, self.given = streams.shape[:-2], streams.shape[-1], streams.shape[-2]
        self.n, self.iterations = n, iterations

    @property
    def runs(self) -> bool:
        """Whether the kernel can run; the composition runs otherwise, also where there is nothing to compute."""
        return self.library is not None and self.tokens.numel() * self.width > 0

    def real(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.dtype).contiguous()

    def new(self, like: Tensor, *shape: int, real: bool = True) -> Tensor:
        return torch.empty((*self.tokens, *shape), dtype=self.dtype if real else like.dtype)

    def coefficients(self, columns: int) -> tuple[Tensor, ...]:
        """Empty `(pre, post, res, z, inverse)`."""
        return tuple(
            torch.empty((*self.tokens, *shape), dtype=self.dtype)
            for shape in ((self.n,), (self.n,), (self.n, self.n), (columns,), (1,))
        )

    def run(self, name: str, tensors: Iterable[Tensor | None], eps: float = 0.0) -> None:
        tokens = self.tokens.numel()
        integers = (tokens, self.width, self.given, self.iterations, threads_for(tokens))
        call(getattr(self.library, f"mhc_{name}"), tensors, integers, eps)


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _as(tensors: Iterable[Tensor], like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(other.dtype) for tensor, other in zip(tensors, like, strict=True))


def read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.fused_reference.read`."""
    kernel = _Call(streams, None, n, mapping, iterations)
    if not kernel.runs:
        return tuple(map(Tensor.contiguous, fused.read(streams, phi, bias, scale, n, mapping, iterations, eps)))
    h = kernel.new(streams, kernel.width, real=False)
    coefficients = kernel.coefficients(phi.shape[-1])
    kernel.run("read", (*_dense(streams), *map(kernel.real, (phi, bias, scale)), h, *coefficients), eps)
    return h, *coefficients


def step(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    bias: Tensor,
    scale: Tensor,
    mapping: str,
    iterations: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.fused_reference.step`."""
    kernel = _Call(streams, branch, post.shape[-1], mapping, iterations)
    if not kernel.runs:
        out = fused.step(streams, branch, post, res, phi, bias, scale, mapping, iterations, eps)
        return tuple(map(Tensor.contiguous, out))
    after = kernel.new(streams, kernel.n, kernel.width, real=False)
    h = kernel.new(streams, kernel.width, real=False)
    coefficients = kernel.coefficients(phi.shape[-1])
    inputs = (*_dense(streams, branch), *map(kernel.real, (post, res, phi, bias, scale)))
    kernel.run("step", (*inputs, after, h, *coefficients), eps)
    return after, h, *coefficients


def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """As `mhc_compile.ops.reference.update`."""
    kernel = _Call(streams, branch, post.shape[-1], None, 1)
    if not kernel.runs:
        return reference.update(streams, branch, post, res).contiguous()
    out = kernel.new(streams, kernel.n, kernel.width, real=False)
    kernel.run("update", (*_dense(streams, branch), *map(kernel.real, (post, res)), out))
    return out


def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """As `mhc_compile.ops.fused_reference.close`."""
    kernel = _Call(streams, branch, post.shape[-1], None, 1)
    if not kernel.runs:
        return fused.close(streams, branch, post, res).contiguous()
    out = kernel.new(streams, kernel.width, real=False)
    kernel.run("close", (*_dense(streams, branch), *map(kernel.real, (post, res)), out))
    return out


def read_backward(
    grad_h: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    streams: Tensor,
    phi: Tensor,
    bias: Tensor,
    scale: Tensor,
    pre: Tensor,
    post: Tensor,
    z: Tensor,
    inverse: Tensor,
    mapping: str,
    iterations: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.fused_reference.read_backward`."""
    kernel = _Call(streams, None, pre.shape[-1], mapping, iterations)
    site = (phi, bias, scale)
    if not kernel.runs:
        given = (grad_h, grad_post, grad_res, streams, *site, pre, post, z, inverse, mapping, iterations, eps)
        return tuple(map(Tensor.contiguous, fused.read_backward(*given)))
    reals = tuple(map(kernel.real, site))
    outs = torch.empty(streams.shape, dtype=streams.dtype), *map(torch.empty_like, reals)  # type: ignore[arg-type]
    grads = (None if grad_h is None else grad_h.to(streams.dtype), kernel.real(grad_post), kernel.real(grad_res))
    kernel.run("read_backward", (*_dense(*grads, streams), *reals, *map(kernel.real, (pre, post, z, inverse)), *outs))
    return _as(outs, (streams, *site))


def step_backward(
    grad_streams: Tensor | None,
    grad_h: Tensor | None,
    grad_post: Tensor | None,
    grad_res: Tensor | None,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    bias: Tensor,
    scale: Tensor,
    next_pre: Tensor,
    next_post: Tensor,
    z: Tensor,
    inverse: Tensor,
    mapping: str,
    iterations: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.fused_reference.step_backward`."""
    kernel = _Call(streams, branch, post.shape[-1], mapping, iterations)
    site = (phi, bias, scale)
    saved = (next_pre, next_post, z, inverse)
    if not kernel.runs:
        given = (
            grad_streams,
            grad_h,
            grad_post,
            grad_res,
            streams,
            branch,
            post,
            res,
            *site,
            *saved,
            mapping,
            iterations,
            eps,
        )
        return tuple(map(Tensor.contiguous, fused.step_backward(*given)))
    wide = (None if grad is None else grad.to(streams.dtype) for grad in (grad_streams, grad_h))
    grads = (*_dense(*wide), kernel.real(grad_post), kernel.real(grad_res))
    reals = tuple(map(kernel.real, (post, res, *site)))
    outs = (*_empty(streams, branch), *map(torch.empty_like, reals))  # type: ignore[arg-type]
    kernel.run("step_backward", (*grads, *_dense(streams, branch), *reals, *map(kernel.real, saved), *outs))
    return _as(outs, (streams, branch, post, res, *site))


def update_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.reference.update_backward`."""
    return _mixing_backward("update", reference.update_backward, grad, streams, branch, post, res)


def close_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """As `mhc_compile.ops.fused_reference.close_backward`."""
    return _mixing_backward("close", fused.close_backward, grad, streams, branch, post, res)


def _mixing_backward(
    name: str, composed: Any, grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, ...]:
    kernel = _Call(streams, branch, post.shape[-1], None, 1)
    if not kernel.runs:
        return tuple(map(Tensor.contiguous, composed(grad, streams, branch, post, res)))
    reals = tuple(map(kernel.real, (post, res)))
    outs = (*_empty(streams, branch), *map(torch.empty_like, reals))  # type: ignore[arg-type]
    kernel.run(f"{name}_backward", (*_dense(grad.to(streams.dtype), streams, branch), *reals, *outs))
    return _as(outs, (streams, branch, post, res))


def _empty(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in like)
