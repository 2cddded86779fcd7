"""Records of runs of a model, compared tensor by tensor, and the test that its sites take part."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.capture.tensor_tree import fresh, map_tensors, tensors
from mhc_compile.inspection.random_state import set_seed
from mhc_compile.inspection.verification.results import Difference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

#: Gradients and buffers count as at least this share of the largest one. Some are zero in exact
#: arithmetic (the bias of k in attention): rounding noise must not be compared with rounding noise.
FLOOR = 1e-3
#: A gradient this far below the largest one is noise and is compared with the largest one.
_NOISE = 1e-5
#: Largest relative error without an excuse. One rounding is 1.1e-16, 6e-8, 4e-3 and 5e-4.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: A larger error is excused up to this multiple of the plain model's own, or of the median of its
#: group: of a tensor with three entries the plain model may be right by accident.
_EXCUSE = 4.0
#: A plain model with a larger error in a wider dtype computes something else there (other random
#: numbers, overflow) and excuses nothing.
_FOREIGN = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class RunRecord:
    """Tensors of one forward and backward pass: detached copies by name (`output.logits`) or path.

    Inputs and buffers are the floating-point ones after the call. `parameters` are the paths of all
    parameters, `written` the inputs that the call changed.
    """

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]
    input_gradients: dict[str, Tensor]
    parameters: frozenset[str]
    written: frozenset[str]


def record_run(
    call: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    differentiable_inputs: bool,
    seed: int = 0,
) -> RunRecord:
    """Call `call` with copies of the inputs, and differentiate a weighted sum of all outputs.

    `call` is `model` or a compiled version of it. Earlier gradients of `model` are dropped, and the
    random state of the caller advances. With `differentiable_inputs`, impossible for models that
    write into their inputs, gradients of floating-point inputs are recorded too.
    """
    model.zero_grad(set_to_none=True)
    args, kwargs = map_tensors(args, fresh), map_tensors(kwargs, fresh)
    inputs = {name: value for name, value in tensors((args, kwargs), "input") if value.is_floating_point()}
    before = {name: fresh(value) for name, value in inputs.items()}
    if differentiable_inputs:
        for value in inputs.values():
            value.requires_grad_()
    set_seed(seed)
    outputs = dict(tensors(call(*args, **kwargs), "output"))
    loss = sum((_weigh(value) for value in outputs.values() if value.requires_grad), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    return RunRecord(
        {name: fresh(value) for name, value in outputs.items()},
        {name: fresh(value) for name, value in inputs.items()},
        {name: fresh(value) for name, value in model.named_buffers() if value.is_floating_point()},
        {name: fresh(value.grad) for name, value in model.named_parameters() if value.grad is not None},
        {name: fresh(value.grad) for name, value in inputs.items() if value.is_leaf and value.grad is not None},
        frozenset(name for name, _ in model.named_parameters()),
        frozenset(name for name, value in inputs.items() if not torch.equal(value, before[name])),
    )


def _weigh(value: Tensor) -> Tensor:
    """Return the sum of the entries with random weights, so that errors do not cancel."""
    flat = _real(value).flatten()
    generator = torch.Generator().manual_seed(flat.numel())
    weights = torch.randn(flat.numel(), generator=generator, dtype=torch.float64) / max(flat.numel(), 1) ** 0.5
    weighed: Tensor = (flat * weights.to(flat)).sum()
    return weighed


def differences(
    got: RunRecord,
    want: RunRecord,
    tolerance: float,
    *,
    exact: RunRecord | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> Iterator[Difference]:
    """Yield the difference of every tensor of `want` and its counterpart in `got`.

    Parameters and buffers that only `got` has belong to the rewrite and are omitted. `prefix` is
    that of the names of the groups; see `compare` for the rest.
    """
    for group, field, share in (
        ("outputs", "outputs", 0.0),
        ("written inputs", "inputs", 0.0),
        ("buffers", "buffers", FLOOR),
        ("gradients", "gradients", FLOOR),
        ("input gradients", "input_gradients", FLOOR),
    ):
        wider = getattr(exact, field) if exact is not None else {}
        found, expected = getattr(got, field), getattr(want, field)
        if group == "written inputs":
            expected = {name: value for name, value in expected.items() if name in got.written | want.written}
        if group == "gradients":  # a missing gradient equals zero, and nothing else
            unused = {name: torch.zeros_like(found[name]) for name in found.keys() & want.parameters - expected.keys()}
            expected = expected | unused
        yield from compare(found, expected, tolerance, prefix + group, share=share, exact=wider, dtype=dtype)


def compare(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: float,
    group: str,
    *,
    share: float = 0.0,
    exact: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Difference]:
    """Yield the differences of one group of tensors of the rewritten model from the plain one's.

    Magnitudes count as at least `share` of the largest in `want`. `exact` are the tensors of the
    plain model in a wider dtype, which show the rounding of `want`. `dtype` is that of the model;
    single tensors may have others.
    """
    largest = max((_magnitude(value) for value in want.values()), default=0.0) if share else 0.0
    floor, noise = share * largest, min(tolerance, _NOISE) * largest
    scales = {name: largest if 0 < _magnitude(value) <= noise else _scale(value, floor) for name, value in want.items()}
    rounding = _rounding(want, exact or {}, scales, _FOREIGN.get(dtype, 0.0))
    usual = statistics.median(rounding.values()) if rounding else 0.0
    for name, value in want.items():
        other, scale = got.get(name), scales[name]
        magnitude, absolute = _magnitude(value), _distance(other, value)
        excused = (
            not absolute / scale <= tolerance
            and name in rounding
            and other is not None
            and exact is not None
            and _distance(other.to(exact[name].dtype), exact[name]) / scale <= _EXCUSE * max(rounding[name], usual)
        )
        identity = group, name, tuple(value.shape), str(value.dtype).removeprefix("torch.")
        floored = 0 < magnitude < floor
        yield Difference(*identity, magnitude, absolute, absolute / scale, tolerance, floored, excused)


def _distance(got: Tensor | None, want: Tensor) -> float:
    """Return the largest absolute error: inf where value, shape, dtype or mask differ."""
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = _real(got), _real(want)
    finite = torch.isfinite(want)  # a mask of -inf among the outputs must be the same mask
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    errors = (got[finite].double() - want[finite].double()).abs()
    return errors.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item() if errors.numel() else 0.0


def _rounding(
    want: Mapping[str, Tensor], exact: Mapping[str, Tensor], scales: Mapping[str, float], foreign: float
) -> dict[str, float]:
    """Return the relative errors of the plain tensors, where the wider dtype computes the same."""
    errors = {
        name: _distance(value.to(exact[name].dtype), exact[name]) / scales[name]
        for name, value in want.items()
        if name in exact and value.is_floating_point()  # another shape is infinitely far
    }
    return {name: error for name, error in errors.items() if error <= foreign}


def _scale(value: Tensor, floor: float) -> float:
    return max(_magnitude(value), floor, 1e-30) if value.is_floating_point() or value.is_complex() else 1.0


def _magnitude(value: Tensor) -> float:
    value = _real(value)
    finite = value[torch.isfinite(value)]
    return float(finite.double().abs().max().item()) if finite.numel() else 0.0


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def randomize(model: nn.Module, connections: Iterable[dict[str, tuple[nn.Parameter, ...]]], seed: int) -> None:
    """Set parameters of hyper-connections and learned read-outs to values far from their init.

    Each entry is (phi, bias, scale) by path, or (weight, bias, scale) of a read-out. With phi = 0,
    as initially, all streams are copies, which hides many a wrong rewrite.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for path, (phi, bias, scale) in [item for found in connections for item in found.items()]:
            speeds = getattr(model.get_submodule(path), "speeds", {"bias": 1.0, "scale": 1.0})
            phi.copy_(normal(phi) / phi.shape[0] ** 0.5)
            bias.add_(0.5 * normal(bias) / speeds["bias"])
            scale.copy_((0.5 + 0.25 * normal(scale).tanh()) / speeds["scale"])


def live_sites(
    connections: dict[str, tuple[nn.Parameter, ...]],
    gradients: dict[str, Tensor],
    outputs: Callable[[], dict[str, Tensor]],
) -> set[str]:
    """Return the hyper-connections that have a gradient, or that change an output when they change.

    `connections` are parameters by path, `gradients` by name; `outputs` runs the model.
    """
    moved = {name for name, value in gradients.items() if value.isfinite().all() and value.any()}
    live = {path for path in connections if not moved.isdisjoint((f"{path}.phi", f"{path}.bias"))}
    rest = [path for path in connections if path not in live]
    before = outputs() if rest else {}
    for path in rest:
        bias = connections[path][1]
        with torch.no_grad():
            old = bias.clone()
            bias.add_(torch.linspace(-1.0, 1.0, bias.numel()).to(bias))
        after = outputs()
        with torch.no_grad():
            bias.copy_(old)
        if any(not torch.equal(value, after[name]) for name, value in before.items()):
            live.add(path)
    return live
