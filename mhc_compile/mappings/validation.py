"""Validation of registered mappings."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from mhc_compile.config.coefficient_spec import MAX_STREAMS
from mhc_compile.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from mhc_compile.mappings.base import ResidualMapping


def validate_mapping(mapping: ResidualMapping) -> tuple[int, ...]:
    """Check every init, and the matrices and gradients of the fewest and of four streams.

    Returns:
        The numbers of streams that the mapping supports.

    Raises:
        OptionError: something does not fit; says what.
    """
    sizes = []
    for n in range(1, MAX_STREAMS + 1):
        with contextlib.suppress(OptionError):
            mapping.check(n)
            sizes.append(n)
    if not sizes:
        raise OptionError(f"mapping {mapping.name!r}: check(n) rejects every number of streams from 1 to {MAX_STREAMS}")
    for n in sizes:
        _try_starts(mapping, n)
    for n in sorted({sizes[0], min(sizes, key=lambda n: abs(n - 4))}):
        _try_matrix(mapping, n)
        _try_backward(mapping, n)
    return tuple(sizes)


def _try_starts(mapping: ResidualMapping, n: int) -> None:
    what = f"mapping {mapping.name!r}, {n} streams"
    logits = mapping.logits(n)
    if isinstance(logits, bool) or not isinstance(logits, int) or logits < 0:
        raise OptionError(f"{what}: logits(n) is {logits!r}; expected how many there are, an integer")
    for method in ("init_preserve", "init_random"):
        vector = getattr(mapping, method)(n)
        if not isinstance(vector, torch.Tensor) or tuple(vector.shape) != (logits,):
            shown = list(vector.shape) if isinstance(vector, torch.Tensor) else repr(vector)
            raise OptionError(f"{what}: {method}(n) is {shown}; expected a tensor [{logits}], as logits(n) is {logits}")


@torch.no_grad()
def _try_matrix(mapping: ResidualMapping, n: int) -> None:
    """Check that the initial matrix for n streams is row-stochastic."""
    what, logits = f"mapping {mapping.name!r}, {n} streams", mapping.logits(n)
    matrix = mapping.matrix(mapping.init_preserve(n).double().expand(2, 3, logits), n, 20)
    if tuple(matrix.shape) != (2, 3, n, n):
        raise OptionError(f"{what}: matrix(logits [2, 3, {logits}]) is {list(matrix.shape)}; expected [2, 3, {n}, {n}]")
    sums = matrix.sum(-1)
    if not bool((sums - 1).abs().max() < 1e-4):
        raise OptionError(
            f"{what}: the rows of matrix(init_preserve(n)) sum to {[round(x, 4) for x in sums[0, 0].tolist()]}; expected 1 each, so that a model that"
            " starts with it computes what it did before"
        )


def _try_backward(mapping: ResidualMapping, n: int) -> None:
    """Compare `backward` with autograd: a subclass may have changed only one of the methods."""
    what, logits = f"mapping {mapping.name!r}, {n} streams", mapping.logits(n)
    generator = torch.Generator().manual_seed(0)
    given = mapping.init_preserve(n).double() + torch.randn(3, logits, dtype=torch.float64, generator=generator)
    grad = torch.randn(3, n, n, dtype=torch.float64, generator=generator)
    with torch.enable_grad():
        leaf = given.requires_grad_()
        matrix = mapping.matrix(leaf, n, 3)
        want = (
            torch.autograd.grad((matrix * grad).sum(), leaf, materialize_grads=True)[0]
            if matrix.requires_grad
            else torch.zeros_like(given)
        )
    try:
        got = mapping.backward(grad, given.detach(), n, 3)
    except Exception as error:
        raise OptionError(f"{what}: backward failed: {error}") from error
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-6, atol=1e-9):
        raise OptionError(
            f"{what}: backward is not the gradient of matrix (they differ by up to {_difference(got, want)}); override `backward` where `matrix`"
            " is overridden, or derive from mhc_compile.ResidualMapping, which differentiates"
        )


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shape, {list(one.shape)} and {list(other.shape)}"
    return f"{float((one - other).abs().max()):.1e}"
