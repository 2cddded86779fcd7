"""The `mhc::` operators. Importing this package registers them.

`decompositions()` gives every operator as plain ATen, so that an exported program needs nothing of ours at run time.
`fused_decompositions()` is what Inductor gets: broadcast forms that fuse, with `mhc::sinkhorn` kept as one node, and the fused operators kept where
there are kernels for them: `cpu` (C++) and `triton` (CUDA).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import mappings
from mhc_compile.config import coefficient_spec as convention
from mhc_compile.mappings.sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.ops import cpu, reference
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import gated_reference as reads
from mhc_compile.ops import library as _library  # noqa: F401 - registers the operators
from mhc_compile.ops.fused_library import is_fused

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["decompositions", "fingerprint", "fused_decompositions", "is_fused", "prepare"]

_mhc = torch.ops.mhc
_SINGLE: dict[Any, Callable[..., Any]] = {
    _mhc.coefficients.default: reference.coefficients,
    _mhc.coefficients_backward.default: reference.coefficients_backward,
}
#: Products written as broadcasts: a batched matrix product would stay an extern kernel, and nothing would fuse round it.
_BROADCAST: dict[Any, Callable[..., Any]] = {
    _mhc.collapse.default: reference.collapse_fused,
    _mhc.collapse_backward.default: reference.collapse_backward_fused,
    _mhc.update.default: reference.update_fused,
}
#: Operators that have kernels: their form in ATen, and where among their arguments are streams, branch, and n or what has n as its last size.
_WITH_KERNELS: dict[Any, tuple[Any, ...]] = {
    _mhc.read.default: (fused.read, 0, None, 4),
    _mhc.read_backward.default: (fused.read_backward, 3, None, 7),
    _mhc.step.default: (fused.step, 0, 1, 2),
    _mhc.step_backward.default: (fused.step_backward, 4, 5, 6),
    _mhc.close.default: (fused.close, 0, 1, 2),
    _mhc.close_backward.default: (fused.close_backward, 1, 2, 3),
    _mhc.update_backward.default: (reference.update_backward_fused, 1, 2, 3),
}


@functools.cache
def _files() -> bytes:
    digest = hashlib.sha256()
    code = [Path(convention.__file__)]
    for package in (Path(__file__).parent, Path(mappings.__file__).parent):
        code.extend(sorted((*package.rglob("*.py"), *package.rglob("*.h"))))
    for path in code:
        digest.update(path.read_bytes())
    return digest.digest()


def fingerprint() -> str:
    """A hash of the code behind the operators, with registered mappings. Compiled graphs that are cached under their names depend on it."""
    digest = hashlib.sha256(_files())
    for name, mapping in sorted(mappings.MAPPINGS.items()):
        digest.update(f"{name} {mappings.code_of(mapping)}".encode())
    return digest.hexdigest()[:16]


def prepare(streams: torch.Tensor, branch: torch.Tensor, n: int, mapping: str) -> None:
    """Begins to build the kernels that a graph with such tensors will call, where they have to be built."""
    if streams.device.type == "cpu" and is_fused(mapping):
        cpu.prepare(streams.dtype, branch.dtype, n, mapping)


def fused_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload to implementation, for Inductor: pointwise and reduction operations round one opaque Sinkhorn.

    The fused operators, and the backward of `mhc::update`, are decomposed only where there is no kernel for them.
    """
    table: dict[Any, Callable[..., Any]] = {**_SINGLE, **_BROADCAST}
    table |= {operator: _unless_kernel(form, *at) for operator, (form, *at) in _WITH_KERNELS.items()}
    return table


def _unless_kernel(decomposition: Callable[..., Any], streams: int, branch: int | None, n: int) -> Callable[..., Any]:
    """The decomposition, which steps back where a kernel takes the tensors at these positions."""

    def decompose(*args: Any) -> Any:
        other = None if branch is None else args[branch].dtype
        device, dtype = args[streams].device.type, args[streams].dtype
        mapping = next((argument for argument in args if isinstance(argument, str)), None)
        number = args[n] if isinstance(args[n], int) else args[n].shape[-1]
        if device == "cpu" and cpu.takes(dtype, other, int(number), mapping):
            return NotImplemented
        if device == "cuda":
            from mhc_compile.ops import triton

            if triton.takes(dtype, other, mapping):
                return NotImplemented
        return decomposition(*args)

    return decompose


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload to implementation in plain ATen, for every operator that computes (`mhc::declare` computes nothing)."""
    table: dict[Any, Callable[..., Any]] = {**_SINGLE, **_BROADCAST}
    table |= {operator: form for operator, (form, *_) in _WITH_KERNELS.items()}
    for form in (reads.gated_read, reads.gated_read_out, reads.read_out):
        table[getattr(_mhc, form.__name__).default] = form
    return {**table, _mhc.sinkhorn.default: sinkhorn, _mhc.sinkhorn_backward.default: sinkhorn_backward}
