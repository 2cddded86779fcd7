"""The fused operators on CPU: one C++ kernel each, forward and backward, one pass over the streams.

A tile of 16 tokens stays in the cache while its new streams are mixed, projected and collapsed. Per
token and site at n = 4 that moves 10 C elements forward and 15 C backward, the least that the
formula allows. Semantics, shapes, and the compositions that run for other dtypes or without a C++
compiler: `mhc_compile.ops.fused_reference`.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.config.coefficient_spec import Convention, parse
from mhc_compile.mappings import columns
from mhc_compile.ops import arguments, reference
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops.cpu.build import call, library, threads_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
#: Held while a library is built: the thread of `prepare` and a first call may want the same one.
_BUILDING = threading.Lock()


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
    }


def _library(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str | None) -> Any:
    """Return the library for a convention; with None any that is built, for kernels without one."""
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
    """Return whether a kernel for these dtypes, n streams and this convention can be built here.

    Without a mapping: a kernel that depends on none.
    """
    return _library(streams, branch or streams, n, mapping) is not None


def prepare(streams: torch.dtype, branch: torch.dtype, n: int, mapping: str) -> threading.Thread | None:
    """Build the kernels in a thread while the caller traces, which takes longer than the compiler.

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
    """One call of a kernel: its library, its sizes, and its tensors in the computed dtype."""

    def __init__(
        self, streams: Tensor, branch: Tensor | None, n: int, mapping: str | None = None, iterations: int = 1
    ) -> None:
        self.library = _library(streams.dtype, streams.dtype if branch is None else branch.dtype, n, mapping)
        self.dtype = reference.compute_dtype(streams)
        self.tokens, self.width, self.given = streams.shape[:-2], streams.shape[-1], streams.shape[-2]
        self.n, self.iterations = n, iterations

    @property
    def runs(self) -> bool:
        """Whether there is a kernel, and something to compute."""
        return self.library is not None and self.tokens.numel() * self.width > 0

    def reals(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.to(self.dtype).contiguous() for tensor in tensors)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty((*self.tokens, *shape), dtype=dtype or self.dtype)

    def coefficients(self, columns: int) -> tuple[Tensor, ...]:
        """Return empty `(pre, post, res, z, inverse)`."""
        return tuple(self.new(*shape) for shape in ((self.n,), (self.n,), (self.n, self.n), (columns,), (1,)))

    def run(self, name: str, tensors: Iterable[Tensor | None], eps: float = 0.0) -> None:
        tokens = self.tokens.numel()
        integers = (tokens, self.width, self.given, self.iterations, threads_for(tokens))
        call(getattr(self.library, f"mhc_{name}"), tensors, integers, eps)


def _dense(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous() for tensor in tensors)


def _gradients_of(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors if tensor is not None)


def _as(tensors: Iterable[Tensor], like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(other.dtype) for tensor, other in zip(tensors, like, strict=True))


def _or_composed(module: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the function of the same name in `module` where a kernel cannot run and returns None."""

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def run(*args: Any) -> Any:
            out = kernel(*args)
            return reference.dense(getattr(module, kernel.__name__))(*args) if out is None else out

        return run

    return decorate


@_or_composed(fused)
def read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...] | None:
    """Run `fused_reference.read`."""
    kernel = _Call(streams, None, n, mapping, iterations)
    if not kernel.runs:
        return None
    outs = kernel.new(kernel.width, dtype=streams.dtype), *kernel.coefficients(phi.shape[-1])
    kernel.run("read", (*_dense(streams), *kernel.reals(phi, bias, scale), *outs), eps)
    return outs


@_or_composed(fused)
def step(*args: Any) -> tuple[Tensor, ...] | None:
    """Run `fused_reference.step`."""
    old, site, (mapping, iterations, eps) = arguments.step(*args)
    kernel = _Call(old.streams, old.branch, old.post.shape[-1], mapping, iterations)
    if not kernel.runs:
        return None
    wide = (kernel.new(*shape, dtype=old.streams.dtype) for shape in ((kernel.n, kernel.width), (kernel.width,)))
    outs = *wide, *kernel.coefficients(site.phi.shape[-1])
    kernel.run("step", (*_dense(old.streams, old.branch), *kernel.reals(old.post, old.res, *site), *outs), eps)
    return outs


@_or_composed(reference)
def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor | None:
    """Run `reference.update`."""
    return _mixing("update", (post.shape[-1], streams.shape[-1]), streams, branch, post, res)


@_or_composed(fused)
def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor | None:
    """Run `fused_reference.close`."""
    return _mixing("close", (streams.shape[-1],), streams, branch, post, res)


def _mixing(
    name: str, shape: tuple[int, ...], streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> Tensor | None:
    kernel = _Call(streams, branch, post.shape[-1])
    if not kernel.runs:
        return None
    out = kernel.new(*shape, dtype=streams.dtype)
    kernel.run(name, (*_dense(streams, branch), *kernel.reals(post, res), out))
    return out


@_or_composed(fused)
def read_backward(*args: Any) -> tuple[Tensor, ...] | None:
    """Run `fused_reference.read_backward`."""
    grads, streams, site, saved, settings = arguments.read_backward(*args)
    kernel = _Call(streams, None, saved.pre.shape[-1], settings.mapping, settings.iterations)
    if not kernel.runs:
        return None
    reals = kernel.reals(*site)
    outs = _gradients_of(streams, *reals)
    wide = (*_dense(grads.h, dtype=streams.dtype), *kernel.reals(grads.post, grads.res), *_dense(streams))
    kernel.run("read_backward", (*wide, *reals, *kernel.reals(*saved), *outs))
    return _as(outs, (streams, *site))


@_or_composed(fused)
def step_backward(*args: Any) -> tuple[Tensor, ...] | None:
    """Run `fused_reference.step_backward`."""
    grad_streams, grads, old, site, saved, settings = arguments.step_backward(*args)
    kernel = _Call(old.streams, old.branch, old.post.shape[-1], settings.mapping, settings.iterations)
    if not kernel.runs:
        return None
    wide = (*_dense(grad_streams, grads.h, dtype=old.streams.dtype), *kernel.reals(grads.post, grads.res))
    reals = kernel.reals(old.post, old.res, *site)
    outs = _gradients_of(old.streams, old.branch, *reals)
    given = (*wide, *_dense(old.streams, old.branch), *reals, *kernel.reals(*saved))
    kernel.run("step_backward", (*given, *outs))
    return _as(outs, (*old, *site))


@_or_composed(reference)
def update_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Any:
    """Run `reference.update_backward`."""
    return _mixing_backward("update_backward", grad, streams, branch, post, res)


@_or_composed(fused)
def close_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Any:
    """Run `fused_reference.close_backward`."""
    return _mixing_backward("close_backward", grad, streams, branch, post, res)


def _mixing_backward(name: str, grad: Tensor, *args: Tensor) -> tuple[Tensor, ...] | None:
    old = arguments.Old(*args)
    kernel = _Call(old.streams, old.branch, old.post.shape[-1])
    if not kernel.runs:
        return None
    reals = kernel.reals(old.post, old.res)
    outs = _gradients_of(old.streams, old.branch, *reals)
    kernel.run(name, (*_dense(grad.to(old.streams.dtype), old.streams, old.branch), *reals, *outs))
    return _as(outs, old)
