"""Ours, a site at a time. The training step needs nothing of this: it is `torch.compile(model, backend="mhc")`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import HyperConnection, Options, ops
from mhc_compile._torch import compile_with_inductor
from mhc_compile._torch.benchmarking import has_kernel
from mhc_compile.tools.bench.residual import Residual

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.bench.shape import Shape

__all__ = ["OperatorsSite", "StepCell", "forget_kernels", "inductor", "step_available"]


def _connection(shape: Shape, mapping: str) -> HyperConnection:
    # init="random": with the preserving init phi is zero, and a product with zeros is a special case that no later step has.
    options = Options(streams=shape.streams, mapping=mapping, iterations=shape.iterations, init="random")
    return HyperConnection(shape.width, options, device=shape.device)


class OperatorsSite(Residual):
    """The three operators: coefficients, collapse, update."""

    def __init__(self, shape: Shape, mapping: str = "sinkhorn") -> None:
        super().__init__()
        self.connection = _connection(shape, mapping)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Holds `(streams, post, res)`."""
        pre, post, res = self.connection.coefficients(streams)
        return torch.ops.mhc.collapse(streams, pre), (streams, post, res)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """`X' = H_res X + H_postᵀ f`."""
        return torch.ops.mhc.update(held[0], branch, held[1], held[2])  # type: ignore[no-any-return]


class StepCell(nn.Module):
    """The cell as one operator, `mhc::step`: the write of a site and the read of the next in one pass over the streams."""

    def __init__(self, shape: Shape, mapping: str = "sinkhorn") -> None:
        super().__init__()
        self.connection = _connection(shape, mapping)

    def forward(self, branch: Tensor, streams: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
        """As `Cell` with `OperatorsSite`."""
        c = self.connection
        out = torch.ops.mhc.step(streams, branch, post, res, c.phi, c.bias, c.scale, c.mapping, c.iterations, c.eps)
        new, h, _, new_post, new_res = out[:5]
        return h, new, new_post, new_res


def step_available(shape: Shape) -> bool:
    """Whether `mhc::step` is registered and has a kernel for this device."""
    return hasattr(torch.ops.mhc, "step") and has_kernel("mhc::step", shape.device)


def inductor(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor as the backend calls it for a rewritten graph: with our decompositions."""
    tag = f"mhc-{ops.fingerprint()}"
    return compile_with_inductor(graph_module, inputs, ops.fused_decompositions(), None, {}, tag)


def forget_kernels() -> None:
    """Drops the C++ kernels that this process has loaded, so that the next compilation builds them, as the first one of a machine does."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mhc_compile.ops."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
