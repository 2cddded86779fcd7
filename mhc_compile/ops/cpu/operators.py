"""The operators on CPU: one C++ kernel each, forward and backward.

A fused operator is one pass over the streams: a tile of 16 tokens stays in the cache while its new
streams are mixed, projected and collapsed. Per token and site at n = 4 that moves 10 C elements
forward and 15 C backward, the least that the formula allows. `shifted_step` and `mix_read` collapse
with weights that they are given, while the new streams are in registers: they need no cache for
that, and no first walk in the backward. Semantics, shapes, and the compositions that run for other
dtypes or without a C++ compiler: `mhc_compile.ops.fused_reference` and
`mhc_compile.ops.lazy_reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import lazy_reference, reference
from mhc_compile.ops.cpu.build import threads_for
from mhc_compile.ops.cpu.kernels import function, library_of
from mhc_compile.ops.lazy_reference import LONGEST
from mhc_compile.ops.norm_reference import NORMS, SETTINGS, bound, tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

#: Tensors that a kernel takes in the dtype of the streams. The branch has its own; all others are
#: what is computed.
AS_STREAMS = ("streams", "grad", "grad_streams", "grad_h")


@dataclass(frozen=True)
class Call:
    """A call of a kernel, apart from its tensors and the number of threads.

    Attributes:
        kernel: arguments of `function`.
        dtypes: of the tensors that the kernel takes, in order, by the names of arguments.
        integers: tokens, features, streams in memory, and so on, as the kernel takes them.
        reals: epsilons.
    """

    kernel: tuple[str, torch.dtype, torch.dtype, int, str | None, bool]
    dtypes: Mapping[str, torch.dtype]
    integers: tuple[Any, ...]
    reals: tuple[float, float]


class Operator:
    """An operator on CPU: its kernel, or where there is none the composition.

    A kernel takes the tensors of the composition in the same order, then the results. A backward
    has the gradients of the forward's tensors as results.
    """

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.lazy = module, name, name.startswith("lazy_")
        self.is_backward = name.endswith("_backward")
        self._signature = getattr(module, name)
        #: The arguments whose gradients a backward returns.
        self.differentiated = tensors_of(getattr(module, name.removesuffix("_backward")))

    def by_name(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments by name."""
        return bound(self._signature, args)

    def call(self, given: Mapping[str, Any]) -> Call | None:
        """Return the call of the kernel, None if there is none.

        The arguments are tensors or anything else that has their `dtype` and `shape`.
        """
        streams, mapping = given["streams"], given.get("mapping")
        branches = given["branches"] if self.lazy else [given.get("branch", streams)]
        n = given["n"] if "n" in given else int((given["post"][-1] if self.lazy else given["post"]).shape[-1])
        store, (other, *others) = streams.dtype, {one.dtype for one in branches}
        if given.get("read_dtype") or others or len(branches) > (LONGEST["cpu"] if self.lazy else 1):
            return None
        if library_of(store, other, n, mapping, lazy=self.lazy) is None:
            return None
        named = dict.fromkeys(AS_STREAMS, store) | {"branch": other, "branches": other}
        compute = reference.compute_dtype(streams)
        sizes = math.prod(streams.shape[:-2]), streams.shape[-1], streams.shape[-2]
        settings = given.get("iterations", 1), NORMS.index(given.get("norm", ""))
        return Call(
            (self.name, store, other, n, mapping, self.lazy),
            {key: named.get(key, compute) for key in given if key not in SETTINGS},
            (*sizes, *([len(branches)] if self.lazy else []), *settings),
            (given.get("eps", 0.0), given.get("norm_eps", 0.0)),
        )

    def __call__(self, *args: Any) -> Any:
        """Run the kernel, or the composition."""
        given = self.by_name(args)
        call = self.call(given) if given["streams"].numel() else None
        if call is None:
            return reference.dense(getattr(self.module, self.name))(*args)
        ready = {key: _ready(given[key], dtype) for key, dtype in call.dtypes.items()}
        outs = self._outs({**given, **ready})
        function(*call.kernel)(*ready.values(), *outs, *call.integers, threads_for(call.integers[0]), *call.reals)
        if self.is_backward:
            likes = (_last(given[key]) for key in self.differentiated)
            return tuple(out if like is None else out.to(like.dtype) for out, like in zip(outs, likes, strict=True))
        return tuple(outs) if len(outs) > 1 else outs[0]

    def _outs(self, given: Mapping[str, Any]) -> list[Tensor]:
        if self.lazy:
            return lazy_reference.empty_outputs(self.name, given)
        streams = given["streams"]
        if self.is_backward:
            likes = (given[key] for key in self.differentiated)
            return [streams.new_empty(0) if like is None else torch.empty_like(like) for like in likes]
        n = given["n"] if "n" in given else given["post"].shape[-1]
        return fused.empty_results(self.name, streams, n, given.get("phi"), given.get("norm", ""))


def _ready(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_ready(one, dtype) for one in value]
    return None if value is None else value.to(dtype).contiguous()


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) else value


_NAMES = ("read", "step", "shifted_step", "mix_read", "close")
_LAZY = ("lazy_step", "lazy_close")
#: By name: the operators of `fused_library` and `lazy_library`, and `update`.
OPERATORS = {
    name + end: Operator(module, name + end)
    for module, names in ((fused, _NAMES), (lazy_reference, _LAZY), (reference, ("update",)))
    for name in names
    for end in ("", "_backward")
}
