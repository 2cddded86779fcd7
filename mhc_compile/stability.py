"""The gain of the residual path: how much a chain of H_res can amplify a signal or a gradient over depth.

Source: arXiv 2512.24880 v2, section 5.3. For the product P = H_L ··· H_1 over the sites of a chain, the forward gain is the largest absolute row
sum of P, the backward gain the largest absolute column sum. A doubly stochastic P has both at 1; Sinkhorn after finitely many iterations has the
first at 1 and the second near it; unconstrained hyper-connections reach thousands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.attachment import connections, unwrap
from mhc_compile.backend import mhc
from mhc_compile.capture import probe
from mhc_compile.errors import AttachError
from mhc_compile.options import Options
from mhc_compile.passes import InlineRegions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Gain", "gain"]


@dataclass(frozen=True)
class Gain:
    """Gains of the composite H_res, averaged over tokens.

    Attributes:
        forward: after each site of the chain, the largest absolute row sum of the product so far.
        backward: the largest absolute column sum.
        streams_distance: root mean square of the streams' deviation from their mean, relative to the mean's, at each site's entry: 0 while the
            streams are still copies of each other.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    streams_distance: tuple[float, ...]

    @property
    def amax_forward(self) -> float:
        """Largest forward gain over depth."""
        return max(self.forward, default=1.0)

    @property
    def amax_backward(self) -> float:
        """Largest backward gain over depth."""
        return max(self.backward, default=1.0)


def gain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any
) -> tuple[Gain, ...]:
    """Runs an attached model once, in eager, and measures the composite H_res of every chain.

    Args:
        model: a model with hyper-connections, compiled or not. It is run without gradients, in the mode that it is in.
        *args: inputs.
        options: as the model was compiled with.
        **kwargs: inputs by name.

    Returns:
        One `Gain` per chain, in graph order.

    Raises:
        AttachError: the model has no hyper-connections.
    """
    target = unwrap(model)
    if not connections(target):
        raise AttachError(
            f"{type(target).__name__} has no hyper-connections to measure. Call the compiled model once, or mhc_compile.attach(model, ...)"
        )
    parsed = Options.parse(options)
    chains: list[list[tuple[Tensor, Tensor]]] = []

    def recording(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG001
        return _Recorder(graph_module, chains).run

    recorded = replace(parsed, inner=recording)
    with torch.no_grad():
        probe(target, lambda graph_module, inputs: mhc(graph_module, inputs, options=recorded), args, kwargs)
    return tuple(_measure(chain) for chain in chains)


class _Recorder(torch.fx.Interpreter):
    """Runs a rewritten graph and keeps, for every chain, the streams that enter each site and its H_res."""

    def __init__(self, graph_module: torch.fx.GraphModule, chains: list[list[tuple[Tensor, Tensor]]]) -> None:
        flat = InlineRegions().apply(graph_module.graph)
        super().__init__(torch.fx.GraphModule(flat.owning_module or graph_module, flat))
        self.chains = chains

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.mhc.coefficients.default:
            source = n.args[0]
            assert isinstance(source, torch.fx.Node)
            if source.target == "expand":  # a chain begins: its streams are copies of the trunk
                self.chains.append([])
            streams, _ = self.fetch_args_kwargs_from_env(n)
            self.chains[-1].append((streams[0].detach(), result[2].detach()))
        return result


def _measure(chain: list[tuple[Tensor, Tensor]]) -> Gain:
    forward, backward, distance = [], [], []
    product: Tensor | None = None
    for streams, res in chain:
        matrices = res.double().flatten(0, -3)
        # Token axes may be reshaped between sites, but their order and number stay.
        product = matrices if product is None else matrices @ product
        forward.append(product.abs().sum(-1).amax(-1).mean().item())
        backward.append(product.abs().sum(-2).amax(-1).mean().item())
        wide = streams.double()
        mean = wide.mean(-2, keepdim=True)
        distance.append(((wide - mean).square().mean().sqrt() / mean.square().mean().sqrt().clamp_min(1e-30)).item())
    return Gain(tuple(forward), tuple(backward), tuple(distance))
