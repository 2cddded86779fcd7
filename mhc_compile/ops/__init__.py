"""The `mhc::` operators. Importing this package registers them.

`decompositions()` gives every operator as plain ATen, so that an exported program needs nothing of ours at run time.
`fused_decompositions()` is what Inductor gets: broadcast forms that fuse, with `mhc::sinkhorn` kept as one node.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import mappings
from mhc_compile.mappings.sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.ops import library as _library  # noqa: F401 - registers the operators
from mhc_compile.ops import reference
from mhc_compile.ops import steps as _steps  # noqa: F401 - registers the fused operators

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["decompositions", "fingerprint", "fused_decompositions"]


@functools.cache
def fingerprint() -> str:
    """A hash of the code behind the operators. Compiled graphs that are cached under the operators' names depend on it."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(mappings.__file__).parent):
        for path in sorted((*package.rglob("*.py"), *package.rglob("*.h"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fused_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload to implementation, for Inductor: pointwise and reduction operations round one opaque Sinkhorn."""
    mhc = torch.ops.mhc
    return {
        mhc.coefficients.default: reference.coefficients,
        mhc.coefficients_backward.default: reference.coefficients_backward,
        mhc.collapse.default: reference.collapse_fused,
        mhc.collapse_backward.default: reference.collapse_backward_fused,
        mhc.update.default: reference.update_fused,
        mhc.update_backward.default: reference.update_backward_fused,
    }


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload to implementation in plain ATen, for every operator that computes (`mhc::declare` computes nothing)."""
    mhc = torch.ops.mhc
    return {
        **fused_decompositions(),
        mhc.sinkhorn.default: sinkhorn,
        mhc.sinkhorn_backward.default: sinkhorn_backward,
    }
