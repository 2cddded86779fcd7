"""Whether hyper-connections take part in a model: with random parameters every one must leave a mark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

__all__ = ["live_sites", "randomize"]


def randomize(connections: Iterable[tuple[nn.Parameter, ...]], seed: int) -> None:
    """Gives parameters values as if they had been trained for long: no stream is like another, no matrix near the uniform one.

    They are phi, bias and scale of hyper-connections, and weight, bias and scale of learned read-outs.

    Where all phi are zero, as they are at the start, streams are copies of each other, and many a wrong rewrite would not be seen.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for phi, bias, scale in connections:
            phi.copy_(normal(phi) / phi.shape[0] ** 0.5)
            bias.add_(0.5 * normal(bias))
            scale.copy_(0.5 + 0.25 * normal(scale).tanh())


def live_sites(
    connections: dict[str, tuple[nn.Parameter, ...]],
    gradients: dict[str, Tensor],
    outputs: Callable[[], dict[str, Tensor]],
) -> set[str]:
    """The paths of those that have a gradient, or, where autograd does not come, that change an output when they change.

    Args:
        connections: parameters by path.
        gradients: of all parameters, by name.
        outputs: runs the model.
    """
    live = {path for path in connections if any(_moved(gradients.get(f"{path}.{part}")) for part in ("phi", "bias"))}
    rest = [path for path in connections if path not in live]
    before = outputs() if rest else {}
    for path in rest:
        bias = connections[path][1]
        with torch.no_grad():
            old = bias.clone()
            bias.add_(torch.linspace(-1.0, 1.0, bias.numel()).to(bias))
        if _differ(before, outputs()):
            live.add(path)
        with torch.no_grad():
            bias.copy_(old)
    return live


def _moved(gradient: Any) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.abs().max() > 0)


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())
