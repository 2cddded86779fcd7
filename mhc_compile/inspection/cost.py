"""Cost of hyper-connections, counted by hand: parameters, FLOPs and bytes.

With n streams of width C and K columns of phi, one site adds per token and forward pass

    FLOPs     projection 2 n C K, its norm 2 n C, collapse 2 n C, update 2 n² C + 2 n C, mapping
    elements  (2 n + 2) C at the floor: one pass reads the streams and f, writes the streams and h
              (5 n + 2) C as lowered now: projection, norm and collapse read the streams each, and
              the update once more
              3 C for the plain add

A backward pass costs twice that. The floor is that of arXiv 2512.24880 v2, table 2, for everything
in one pass (10 C at n = 4).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add
from typing import TYPE_CHECKING

from mhc_compile import _torch
from mhc_compile.mappings import get_mapping
from mhc_compile.passes.analysis.op_info import tensor_value

if TYPE_CHECKING:
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Site


@dataclass(frozen=True)
class Cost:
    """Cost of sites per token and forward pass."""

    parameters: int = 0  #: new parameters (per model, not per token)
    flops: int = 0  #: added floating-point operations
    bytes_lowered: int = 0  #: bytes moved by the site as it is lowered now, estimated
    bytes_floor: int = 0  #: bytes that any implementation must move
    bytes_plain: int = 0  #: bytes that the plain residual add moves

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(add, astuple(self), astuple(other)))

    def times(self, count: int) -> Cost:
        """Return the cost of `count` runs with the same parameters."""
        return Cost(self.parameters, *(value * count for value in astuple(self)[1:]))


@dataclass(frozen=True)
class Work:
    """Work of one forward pass over all tokens."""

    flops: int = 0  #: floating-point operations of matrix products, convolutions and attention
    activations: int = 0  #: elements of activations that are read and written; grows with the tokens
    weights: int = 0  #: elements of weights that are read; the same for any number of tokens

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))


def site_cost(width: int, itemsize: int, options: ResolvedOptions) -> Cost:
    """Return the cost of one site of width C whose trunk has elements of `itemsize` bytes."""
    n, c = options.streams, width
    parameters, coefficients = (_gated if options.rank else _sigmoid)(n, c, options)
    return Cost(
        parameters=parameters,
        flops=coefficients + 2 * n * c + 2 * n * n * c + 2 * n * c,
        bytes_lowered=(5 * n + 2) * c * itemsize,
        bytes_floor=(2 * n + 2) * c * itemsize,
        bytes_plain=3 * c * itemsize,
    )


def site_work(site: Site, options: ResolvedOptions) -> tuple[Work, Work]:
    """Return the work of a site beyond its plain add, for all tokens of the example inputs.

    As it is lowered now, and at the floor of bytes.
    """
    value = tensor_value(site.add)
    assert value is not None
    tokens = _torch.example_size(value.numel()) // site.width
    cost = site_cost(site.width, 1, options)

    def work(moved: int) -> Work:
        return Work(cost.flops * tokens, (moved - cost.bytes_plain) * tokens, cost.parameters)

    return work(cost.bytes_lowered), work(cost.bytes_floor)


def end_cost(width: int, options: ResolvedOptions) -> Cost:
    """Return the cost of the end of a chain beyond the mean of its streams."""
    n, c = options.streams, width
    if options.read_out != "learned" or options.single_pass:
        return Cost()
    if options.rank:
        return Cost(2 * options.rank * n * c + n * c, 4 * options.rank * n * c + 5 * n * c)
    return Cost(n * c * n + n + 1, 2 * n * c * n + 2 * n * c)


def _sigmoid(n: int, c: int, options: ResolvedOptions) -> tuple[int, int]:
    """Return parameters, and FLOPs of the coefficients, with one weight per stream."""
    mapping = get_mapping(options.mapping)
    k = 2 * n + mapping.logits(n)
    if not options.token_dependent:  # computed once for all tokens
        return k, 0
    return n * c * k + k + 3, 2 * n * c * k + 2 * n * c + mapping.flops(n, options.iterations)


def _gated(n: int, c: int, options: ResolvedOptions) -> tuple[int, int]:
    """Return the same with one weight per channel: norm, down to the rank and up again, gates."""
    rank = options.rank
    return n * c * (rank + n) + n * c + rank * n * c, 2 * n * c * (rank + n) + 2 * rank * n * c + 5 * n * c
