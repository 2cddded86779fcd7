"""What hyper-connections add, counted by hand: parameters, FLOPs and bytes per token.

With n streams of width C and K columns of phi, one site adds per token and forward pass

    projection 2 n C K, its norm 2 n C, collapse 2 n C, update 2 n² C + 2 n C, the mapping's    FLOPs (a backward costs twice that)
    (2 n + 2) C elements at the floor: one pass reads the streams and f, and writes the streams and h            (plain add: 3 C)
    (5 n + 2) C elements as lowered now: projection, norm and collapse each read the streams, the update once more

The floor is the figure of arXiv 2512.24880 v2, table 2, for everything in one pass (10 C at n = 4).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mhc_compile import _torch
from mhc_compile.mappings import get_mapping

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from mhc_compile.config.options import ResolvedOptions

__all__ = ["Cost", "end_cost", "plain_flops", "site_cost"]


@dataclass(frozen=True)
class Cost:
    """Cost of sites, added up. Per token, forward pass, unless the name says otherwise.

    Attributes:
        parameters: new parameters (per model, not per token).
        flops: added floating-point operations.
        bytes_lowered: bytes moved by the site as it is lowered now, estimated.
        bytes_floor: bytes that any implementation must move.
        bytes_plain: bytes that the plain residual add moves.
    """

    parameters: int = 0
    flops: int = 0
    bytes_lowered: int = 0
    bytes_floor: int = 0
    bytes_plain: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, count: int) -> Cost:
        """The cost of running this `count` times with the same parameters."""
        values = {name: getattr(self, name) * count for name in self.__dataclass_fields__}
        return Cost(**{**values, "parameters": self.parameters})


def site_cost(width: int, itemsize: int, options: ResolvedOptions) -> Cost:
    """Cost of one site of width C whose trunk has elements of `itemsize` bytes. `options` are those of the site (`Options.at`)."""
    n, c = options.streams, width
    parameters, coefficients = (_gated if options.rank else _weights)(n, c, options)
    return Cost(
        parameters=parameters,
        flops=coefficients + 2 * n * c + 2 * n * n * c + 2 * n * c,
        bytes_lowered=(5 * n + 2) * c * itemsize,
        bytes_floor=(2 * n + 2) * c * itemsize,
        bytes_plain=3 * c * itemsize,
    )


def _weights(n: int, c: int, options: ResolvedOptions) -> tuple[int, int]:
    """Parameters of a site with a weight for every stream, and the FLOPs of its coefficients. Static ones are computed once for all tokens."""
    mapping = get_mapping(options.mapping)
    k = 2 * n + mapping.logits(n)
    if not options.token_dependent:
        return k, 0
    return n * c * k + k + 3, 2 * n * c * k + 2 * n * c + mapping.flops(n, options.iterations)


def _gated(n: int, c: int, options: ResolvedOptions) -> tuple[int, int]:
    """The same with a weight for every channel: a norm of the streams, down to the rank and up again, and the gates."""
    rank = options.rank
    return n * c * (rank + n) + n * c + rank * n * c, 2 * n * c * (rank + n) + 2 * rank * n * c + 5 * n * c


def end_cost(width: int, options: ResolvedOptions) -> Cost:
    """What the end of a chain costs beyond the mean of its streams, whose traffic is the same."""
    n, c = options.streams, width
    if options.read_out != "learned" or options.single_pass:
        return Cost()
    if options.rank:
        return Cost(2 * options.rank * n * c + n * c, 4 * options.rank * n * c + 5 * n * c)
    return Cost(n * c * n + n + 1, 2 * n * c * n + 2 * n * c)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:  # noqa: ARG001
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]


#: torch's counter knows the attention kernels of CUDA only.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def plain_flops(graph_module: GraphModule) -> int | None:
    """FLOPs of one forward pass of a traced graph, counted on its example values; None if an operation cannot run on them."""
    inputs = [
        node.meta.get("example_value", node.meta.get("val"))
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
    ]
    mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), contextlib.nullcontext())
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
    try:
        with mode, counter, torch.no_grad():
            torch.fx.Interpreter(graph_module).run(*inputs)
    except Exception:  # an estimate must not make a report fail, whatever a model's operations raise
        return None
    return _torch.example_size(counter.get_total_flops())
