"""The `mhc::` operators. Importing this package registers them.

`decompositions()` gives every operator as plain ATen, so that an exported program runs without this
package. `fused_decompositions()` is for Inductor: broadcast forms that fuse, `mhc::sinkhorn` as one
node, and the fused operators where there are kernels for them: `cpu` (C++), `triton` (CUDA).
"""

from __future__ import annotations

import functools
import hashlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import mappings
from mhc_compile.config import coefficient_spec as convention
from mhc_compile.mappings.sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.ops import cpu, reference
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import gated_reference as reads
from mhc_compile.ops import lazy_library as _lazy_library  # noqa: F401 - registers the lazy operators
from mhc_compile.ops import library as _library  # noqa: F401 - registers the operators
from mhc_compile.ops.fused_library import is_fused
from mhc_compile.ops.lazy_reference import LONGEST
from mhc_compile.ops.norm_reference import bound

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = [
    "decompositions",
    "externs",
    "fingerprint",
    "fused_decompositions",
    "is_fused",
    "is_lazy",
    "longest",
    "prepare",
    "takes_norm",
]

_mhc = torch.ops.mhc
#: Products are written as broadcasts: nothing fuses with a batched matrix product.
_COMPOSED: dict[Any, Callable[..., Any]] = {
    _mhc.coefficients.default: reference.coefficients,
    _mhc.coefficients_backward.default: reference.coefficients_backward,
    _mhc.collapse.default: reference.collapse_fused,
    _mhc.collapse_backward.default: reference.collapse_backward_fused,
    _mhc.update.default: reference.update_fused,
}
#: Operators that have kernels, with their composition of ATen operations.
_WITH_KERNELS: dict[Any, Callable[..., Any]] = {
    _mhc.read.default: fused.read,
    _mhc.read_backward.default: fused.read_backward,
    _mhc.step.default: fused.step,
    _mhc.step_backward.default: fused.step_backward,
    _mhc.shifted_step.default: fused.shifted_step,
    _mhc.shifted_step_backward.default: fused.shifted_step_backward,
    _mhc.mix_read.default: fused.mix_read,
    _mhc.mix_read_backward.default: fused.mix_read_backward,
    _mhc.close.default: fused.close,
    _mhc.close_backward.default: fused.close_backward,
    _mhc.update_backward.default: reference.update_backward_fused,
}
#: Operators that are written only where they have a kernel.
_LAZY = (
    _mhc.lazy_step.default, _mhc.lazy_step_backward.default,
    _mhc.lazy_close.default, _mhc.lazy_close_backward.default,
)  # fmt: skip


@functools.cache
def _files() -> bytes:
    digest = hashlib.sha256()
    code = [Path(convention.__file__), Path(__file__).parents[1] / "_torch" / "inductor.py"]
    for package in (Path(__file__).parent, Path(mappings.__file__).parent):
        code.extend(sorted((*package.rglob("*.py"), *package.rglob("*.h"))))
    for path in code:
        digest.update(path.read_bytes())
    return digest.digest()


def fingerprint() -> str:
    """Return a hash of the code of the operators and registered mappings.

    Graphs that are cached under the names of operators depend on it.
    """
    digest = hashlib.sha256(_files())
    for name, mapping in sorted(mappings.MAPPINGS.items()):
        digest.update(f"{name} {mappings.code_of(mapping)}".encode())
    return digest.hexdigest()[:16]


def prepare(
    streams: torch.Tensor, branch: torch.Tensor, n: int, width: int, mapping: str,
    *, single_pass: bool = False, lazy: bool = False, norms: Collection[str] = ("",),
) -> None:  # fmt: skip
    """Start to build the kernels that a graph with such tensors will call.

    Args:
        streams: a tensor of the dtype and on the device of the streams, fake or not.
        branch: likewise for the outputs of branches.
        n: the number of streams.
        width: their features, C.
        mapping: the convention.
        single_pass: whether sites read with the weights of the site before.
        lazy: whether streams may stay unwritten.
        norms: kinds of norms that the reads may compute. On CPU one kernel computes all.
    """
    if streams.device.type == "cpu" and is_fused(mapping):
        cpu.prepare(streams.dtype, branch.dtype, n, mapping)
        if lazy:
            cpu.prepare(streams.dtype, branch.dtype, n, mapping, lazy=True)
    if streams.device.type == "cuda" and on_triton(streams.device, streams.dtype, branch.dtype, mapping):
        from mhc_compile.ops.triton import ahead

        site = streams.dtype, branch.dtype, n, width, mapping
        lazy = lazy and is_lazy(streams, [branch], n, mapping)
        kinds = [ahead.launches_of(*site, single_pass=single_pass, lazy=lazy, norm=norm) for norm in norms]
        ahead.prepare(chain.from_iterable(one for kind in kinds for one in kind.values()), streams.device)


def on_triton(
    device: torch.device, streams: torch.dtype, branch: torch.dtype | None = None, mapping: str | None = None
) -> bool:
    """Return whether Triton kernels run on this "cuda" device for these dtypes and this mapping."""
    from mhc_compile.ops import triton

    return triton.takes(streams, branch, mapping) and triton.reason(device) is None


def takes_norm(streams: torch.Tensor, branch: torch.Tensor, n: int, mapping: str | None) -> bool:
    """Return whether a fused operator of such tensors has a kernel that computes a norm too.

    On CPU it is enough that one can be built: to wait for the compiler costs more than the
    composition, which runs where there is none.
    """
    if streams.device.type == "cuda":
        return on_triton(streams.device, streams.dtype, branch.dtype, mapping)
    return streams.device.type == "cpu" and cpu.can_take(streams.dtype, branch.dtype, n, mapping)


def is_lazy(streams: torch.Tensor, branches: list[torch.Tensor], n: int, mapping: str, *, close: bool = False) -> bool:
    """Return whether a lazy step, or close, has a kernel for streams and branches of such tensors.

    On CUDA there is none for more than four streams, as all sources of a token are held at once,
    and no close, of which a chain has one.
    """
    if streams.device.type == "cuda":
        dtypes = {branch.dtype for branch in branches}
        return (
            n <= 4
            and not close
            and len(dtypes) == 1
            and on_triton(streams.device, streams.dtype, dtypes.pop(), mapping)
        )
    return streams.device.type == "cpu" and is_fused(mapping) and cpu.takes_lazy(streams, branches, n, mapping)


def longest(device: torch.device) -> int:
    """Return how many sites lazy streams go from one writing to the next at most."""
    return LONGEST.get(device.type, 1)


def fused_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return implementations by operator overload for Inductor, around one opaque Sinkhorn.

    The fused operators, and the backward of `mhc::update`, are decomposed only where there is no
    kernel for them.
    """
    with_kernels = {operator: _unless_kernel(composed) for operator, composed in _WITH_KERNELS.items()}
    return {**_COMPOSED, **with_kernels, **dict.fromkeys(_LAZY, lambda *args: NotImplemented)}  # noqa: ARG005


def externs() -> dict[Any, Callable[..., Any]]:
    """Return by operator overload what makes Inductor call a kernel without a dispatcher."""
    from mhc_compile.ops.cpu import lowering

    return lowering.externs()


def _unless_kernel(composition: Callable[..., Any]) -> Callable[..., Any]:
    """Return `composition`, made to return NotImplemented where a kernel takes its tensors.

    Its parameters have the names of the schema.
    """

    def decompose(*args: Any) -> Any:
        given = bound(composition, args)
        streams, branch, mapping = given["streams"], given.get("branch"), given.get("mapping")
        n = given["n"] if "n" in given else int(given["post"].shape[-1])
        other = None if branch is None else branch.dtype
        if streams.device.type == "cpu" and cpu.takes(streams.dtype, other, n, mapping):
            return NotImplemented
        if streams.device.type == "cuda" and on_triton(streams.device, streams.dtype, other, mapping):
            return NotImplemented
        return composition(*args)

    return decompose


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return implementations in plain ATen by operator overload.

    `mhc::declare` computes nothing and has none.
    """
    return {
        **_COMPOSED,
        **_WITH_KERNELS,
        _mhc.coefficients.default: reference.differentiable_coefficients,
        _mhc.gated_read.default: reads.gated_read,
        _mhc.gated_read_out.default: reads.gated_read_out,
        _mhc.read_out.default: reads.read_out,
        _mhc.sinkhorn.default: sinkhorn,
        _mhc.sinkhorn_backward.default: sinkhorn_backward,
    }
