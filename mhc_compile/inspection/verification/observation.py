"""One forward and backward pass of a model, and everything that came of it."""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.capture.tensor_tree import fresh, map_tensors, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Observation", "observe", "seeded"]


@dataclass(frozen=True)
class Observation:
    """What a pass left behind, by name. Copies, without a history.

    Attributes:
        outputs: `output`, `output.logits`, `output.0`; floating point, complex and, where they are not, integers.
        inputs: the floating-point inputs as they were after the call: `input.0.0`, `input.1.mask`.
        buffers: floating-point buffers after the call, by their path.
        gradients: of parameters that have one, by their path.
        input_gradients: of inputs that have one.
        parameters: the paths of all parameters.
        written: the inputs that are not what they were before the call.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]
    input_gradients: dict[str, Tensor]
    parameters: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()


def observe(
    call: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    differentiable_inputs: bool,
    seed: int = 0,
) -> Observation:
    """Calls `call` with copies of the inputs, and differentiates a sum in which every entry of every output has another weight.

    Gradients that the parameters of `model` have from before are dropped. The caller's random numbers are used up: see `seeded`.

    Args:
        call: the model, or a compiled version of it.
        model: whose parameters and buffers are looked at.
        args: inputs.
        kwargs: inputs by name.
        differentiable_inputs: ask for the gradients of floating-point inputs. Not for models that write into them.
        seed: of the random numbers of torch, Python and NumPy, all of which models draw from.
    """
    model.zero_grad(set_to_none=True)
    args, kwargs = map_tensors(args, fresh), map_tensors(kwargs, fresh)
    inputs = {name: value for name, value in tensors((args, kwargs), "input") if value.is_floating_point()}
    before = {name: fresh(value) for name, value in inputs.items()}
    if differentiable_inputs:
        for value in inputs.values():
            value.requires_grad_()
    _seed(seed)
    outputs = dict(tensors(call(*args, **kwargs), "output"))
    loss = sum((_weigh(value) for value in outputs.values() if value.requires_grad), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    return Observation(
        {name: fresh(value) for name, value in outputs.items()},
        {name: fresh(value) for name, value in inputs.items()},
        {name: fresh(value) for name, value in model.named_buffers() if value.is_floating_point()},
        {name: fresh(value.grad) for name, value in model.named_parameters() if value.grad is not None},
        {name: fresh(value.grad) for name, value in inputs.items() if value.is_leaf and value.grad is not None},
        frozenset(name for name, _ in model.named_parameters()),
        frozenset(name for name, value in inputs.items() if not torch.equal(value, before[name])),
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, Python and NumPy begin at `seed` inside, and go on outside as if nothing had been."""
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng():
        try:
            _seed(seed)
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _weigh(value: Tensor) -> Tensor:
    """A scalar to which every entry contributes, each with another weight. The weights follow no pattern: sums of them do not cancel."""
    flat = torch.view_as_real(value).flatten() if value.is_complex() else value.flatten()
    generator = torch.Generator().manual_seed(flat.numel())
    weights = torch.randn(flat.numel(), generator=generator, dtype=torch.float64) / max(flat.numel(), 1) ** 0.5
    weighed: Tensor = (flat * weights.to(flat)).sum()
    return weighed
