"""Whether a rewritten model computes what the plain one does: outputs, buffers, what was written into the inputs, and every original gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import MhcWarning

if TYPE_CHECKING:
    from mhc_compile.zoo.family import Case

__all__ = ["Errors", "preservation"]

#: A gradient that is zero in exact arithmetic (the bias of k in attention) is rounding noise, and so is the mean of something normalised. So that
#: noise is not compared with noise, the magnitude of a gradient or buffer counts as at least this share of the largest one.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Errors:
    """Largest relative deviations, and the names of the values that deviate most."""

    forward: float
    gradients: float
    worst_output: str
    worst_gradient: str


@dataclass(frozen=True)
class _Run:
    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]


def preservation(case: Case, options: Mapping[str, Any], *, double: bool, differentiable_inputs: bool) -> Errors:
    """Runs the model plain and compiled, forward and backward with the same random numbers, and compares.

    Parameters that the rewrite added have no counterpart and are left out.

    Raises:
        ValueError: the plain model's values are not numbers.
        Exception: whatever the model raises in either form.
    """
    model, args, kwargs = case
    if double:
        model, args, kwargs = model.double(), _map(args, _to_double), _map(kwargs, _to_double)
    twin = copy.deepcopy(model)
    want = _run(twin, twin, args, kwargs, differentiable_inputs)
    undefined = [name for name, value in {**want.values, **want.gradients}.items() if value.isnan().any()]
    if undefined:
        raise ValueError(f"the plain model gives NaN in {', '.join(undefined[:3])}: there is nothing to compare with")
    compiled = torch.compile(model, backend="mhc", options={"inner": "eager", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MhcWarning)  # that nothing was rewritten is in the count of sites
        got = _run(compiled, model, args, kwargs, differentiable_inputs)
    outputs = _compare(got.values, want.values, 0.0) | _compare(got.buffers, want.buffers, _FLOOR)
    gradients = _compare(got.gradients, want.gradients, _FLOOR)
    output, gradient = _worst(outputs), _worst(gradients)
    return Errors(outputs.get(output, 0.0), gradients.get(gradient, 0.0), output, gradient)


def _run(call: Any, model: nn.Module, args: Any, kwargs: Any, differentiable_inputs: bool) -> _Run:
    args, kwargs = _map(args, _fresh), _map(kwargs, _fresh)
    inputs = dict(_tensors((args, kwargs), "input"))
    if differentiable_inputs:
        for value in inputs.values():
            value.requires_grad_()
    torch.manual_seed(0)
    outputs = dict(_tensors(call(*args, **kwargs), "output"))
    loss = sum((_weigh(value) for value in outputs.values() if value.requires_grad), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    values, learned = outputs | inputs, dict(model.named_parameters()) | inputs
    return _Run(
        {name: _fresh(value) for name, value in values.items()},
        {f"buffer {name}": _fresh(value) for name, value in model.named_buffers() if value.is_floating_point()},
        {name: _fresh(value.grad) for name, value in learned.items() if value.is_leaf and value.grad is not None},
    )


def _compare(got: dict[str, Tensor], want: dict[str, Tensor], share: float) -> dict[str, float]:
    """The deviation of each value; magnitudes count as at least `share` of the largest of all."""
    floor = share * max((value.abs().max().item() for value in want.values() if value.numel()), default=0.0)
    return {name: _relative(got.get(name), value, floor) for name, value in want.items()}


def _weigh(value: Tensor) -> Tensor:
    """A scalar to which every entry contributes, each with another weight."""
    weights = torch.arange(value.numel(), dtype=value.dtype, device=value.device).cos() / max(value.numel(), 1) ** 0.5
    return (value.flatten() * weights).sum()


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested containers, with the path that leads to each."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{name}.{index}")
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name), f"{name}.{entry.name}")


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(entry, function) for key, entry in value.items()}
    return type(value)(_map(entry, function) for entry in value) if isinstance(value, (tuple, list)) else value


def _fresh(value: Tensor) -> Tensor:
    return value.detach().clone()


def _to_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _relative(got: Tensor | None, want: Tensor, floor: float = 0.0) -> float:
    """Largest deviation over the largest magnitude; infinite where the value is missing or has another shape or dtype."""
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    finite = torch.isfinite(want)  # a mask of -inf among the outputs must be the same mask
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(want[finite].abs().max().item(), floor, 1e-30)
    error = (got[finite].double() - want[finite].double()).abs().max().item() / scale
    return error if error == error else float("inf")  # NaN: got is not finite where want is


def _worst(errors: dict[str, float]) -> str:
    return max(errors, key=errors.__getitem__) if errors else ""
