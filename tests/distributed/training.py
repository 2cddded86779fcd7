"""A model with hyper-connections far from their start, ten steps of training, and what came of
them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.builders import Decoder, tokens
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mhc_compile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STEPS, BATCH = 10, 4


class Recomputing(Decoder):
    """A decoder that writes activation checkpointing into its forward."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


class Wrapped(Decoder):
    """A decoder whose blocks are wrapped for activation checkpointing."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(width, layers)
        for i, block in enumerate(self.blocks):
            self.blocks[i] = checkpoint_wrapper(block)


def build(width: int = 16, layers: int = 3, kind: type[Decoder] = Decoder) -> Decoder:
    """A decoder with hyper-connections attached, the same in every process."""
    torch.manual_seed(1)
    model = kind(width, layers)
    mhc_compile.attach(model, tokens(BATCH))
    shake(model)
    return model


class Spy:
    """An inner compiler that compiles nothing and keeps the graphs that it gets."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        return graph_module.forward


def shake(model: nn.Module) -> None:
    """Random hyper-connections: streams that differ from each other, and coefficients that depend
    on them.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            for name, size in (("phi", 0.3), ("bias", 0.5), ("scale", 0.5)):
                parameter = connection.get_parameter(name)
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator), alpha=size / connection.speeds.get(name, 1)
                )


def batches(part: int = 0, parts: int = 1) -> Iterable[tuple[Tensor, Tensor]]:
    """Tokens and targets of every step; of each batch the share number `part` of `parts`."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        batch = torch.randint(0, 11, (BATCH, 6), generator=generator).chunk(parts)[part]
        yield batch[:, :-1], batch[:, 1:]


@dataclass(frozen=True)
class Trained:
    """Losses of every step, over the whole batch, and the parameters at the end by their names in
    the plain model.
    """

    losses: list[float]
    parameters: dict[str, Tensor]

    def assert_close(self, other: Trained, tolerance: float = 1e-5) -> None:
        assert self.parameters.keys() == other.parameters.keys()
        for step, (mine, theirs) in enumerate(zip(self.losses, other.losses, strict=True)):
            assert abs(mine - theirs) < tolerance, (step, mine, theirs)
        errors = {n: (p - other.parameters[n]).abs().max().item() for n, p in self.parameters.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < tolerance, (worst, errors[worst])


def train(
    call: Callable[..., Any],
    model: nn.Module,
    part: int = 0,
    parts: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
    wrapper: nn.Module | None = None,
    micro: int = 1,
    shake_after: int | None = None,
) -> Trained:
    """Ten steps of `call`, or `steps` of them, on one share of every batch.

    The share is cut in `micro` pieces whose gradients are added up. For all but the last `wrapper`,
    DDP or a model under FSDP2, reduces nothing. Hyper-connections are shaken after the step
    `shake_after`.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step, (inputs, targets) in zip(steps, islice(batches(part, parts), steps.start, steps.stop), strict=True):
        optimizer.zero_grad()
        total = torch.zeros(())
        for number, (some, wanted) in enumerate(zip(inputs.chunk(micro), targets.chunk(micro), strict=True)):
            waits = number < micro - 1
            if isinstance(wrapper, FSDPModule):
                wrapper.set_requires_gradient_sync(not waits)
            with wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) and waits else nullcontext():
                loss = F.cross_entropy(call(some).flatten(0, 1).float(), wanted.flatten()) / micro
                loss.backward()
            total += loss.detach() / parts
        optimizer.step()
        if step == shake_after:
            shake(model)
        if parts > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return Trained(losses, {plain_name(name): whole(p) for name, p in model.named_parameters()})


def plain_name(name: str) -> str:
    """Without what wrappers put in."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter, sharded or not."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()
