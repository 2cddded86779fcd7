"""The lazy operators on CPU: the kernels of `lazy.h`, a library of their own.

Semantics, shapes, and the compositions that run for other dtypes, longer lists or without a C++
compiler: `mhc_compile.ops.lazy_reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.ops import lazy_reference as lazy
from mhc_compile.ops import reference
from mhc_compile.ops.cpu.build import call, threads_for
from mhc_compile.ops.cpu.kernels import AS_STREAMS, library_of
from mhc_compile.ops.norm_reference import NORMS

if TYPE_CHECKING:
    from collections.abc import Callable


def takes(streams: Tensor, branches: list[Tensor], n: int, mapping: str | None) -> bool:
    """Return whether there is a kernel for sites with these branch outputs, all of one dtype."""
    if len({branch.dtype for branch in branches}) > 1 or len(branches) > lazy.LONGEST["cpu"]:
        return False
    return library_of(streams.dtype, branches[0].dtype, n, mapping, lazy=True) is not None


def _kernel(name: str) -> Callable[..., Any]:
    """Return an operator on CPU: its kernel, or where there is none the composition.

    A kernel takes the tensors of the composition in the same order, then the results.
    """
    composition = getattr(lazy, name)

    def run(*args: Any) -> Any:
        given = lazy.by_name(name, args)
        streams, branches, post, mapping = given["streams"], given["branches"], given["post"], given.get("mapping")
        n = post[-1].shape[-1]
        if given.pop("read_dtype", None) or not streams.numel() or not takes(streams, branches, n, mapping):
            return reference.dense(composition)(*args)
        compute = reference.compute_dtype(streams)
        dtypes = {**dict.fromkeys(AS_STREAMS, streams.dtype), "branches": branches[-1].dtype}

        def ready(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, list):
                return [ready(one, dtype) for one in value]
            return None if value is None else value.to(dtype).contiguous()

        tensors = {
            key: ready(value, dtypes.get(key, compute))
            for key, value in given.items()
            if value is None or isinstance(value, Tensor | list)
        }
        outs = lazy.empty_outputs(name, {**given, **tensors, "read_dtype": None})
        library = library_of(streams.dtype, branches[-1].dtype, n, mapping, lazy=True)
        tokens, width = streams.shape[:-2].numel(), streams.shape[-1]
        sizes = (tokens, width, streams.shape[-2], len(branches), given.get("iterations", 1), threads_for(tokens))
        norm = NORMS.index(given.get("norm", ""))
        epsilons = given.get("eps", 0.0), given.get("norm_eps", 0.0)
        call(getattr(library, f"mhc_{name}"), (*tensors.values(), *outs), (*sizes, norm), *epsilons)
        if name.endswith("_backward"):
            likes = lazy.differentiated(name, given)
            return tuple(out if like is None else out.to(like.dtype) for out, like in zip(outs, likes, strict=True))
        return tuple(outs) if len(outs) > 1 else outs[0]

    return run


lazy_step, lazy_step_backward = _kernel("lazy_step"), _kernel("lazy_step_backward")
lazy_close, lazy_close_backward = _kernel("lazy_close"), _kernel("lazy_close_backward")
