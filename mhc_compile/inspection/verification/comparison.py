"""Two observations, tensor by tensor."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mhc_compile.inspection.verification.observation import Observation

__all__ = ["FLOOR", "TOLERANCES", "Difference", "compare", "differences", "tolerance_of"]

#: A gradient that is zero in exact arithmetic (the bias of k in attention) is rounding noise, and so is the mean of something normalised. So that
#: noise is not compared with noise, the magnitude of a gradient or buffer counts as at least this share of the largest one.
FLOOR = 1e-3

#: A gradient this far below the largest one is nothing else: it is compared with the largest one.
_NOISE = 1e-5

#: The largest relative error that needs no excuse. Rounding once is 1.1e-16, 6e-8, 4e-3 and 5e-4.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

#: A tensor that deviates by more passes if it is no further from the same model in a wider dtype than this many times the plain one is, or the
#: median tensor of the plain one's group: of a tensor with three entries the plain model may have hit upon the right ones.
EXCUSE = 4.0
#: A plain model that is further than this from itself in a wider dtype computes something else there (it has other random numbers, or overflows):
#: nothing can be excused by it.
_FOREIGN = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class Difference:
    """One tensor, in the plain model and in the rewritten one.

    Attributes:
        group: "outputs", "written inputs", "buffers", "gradients", "input gradients", or one of these of another proof ("live: gradients").
        name: path of the parameter or buffer, or of the value in what the model takes and returns.
        shape: its shape.
        dtype: its dtype, without "torch.".
        magnitude: largest absolute entry in the plain model.
        absolute: largest absolute error.
        relative: `absolute` over `magnitude`, or over the floor of the group where that is larger. inf where the value is missing on one side or
            has another shape, dtype or other entries that are not finite.
        allowed: largest `relative` that is ok.
        floored: the magnitude is below the floor: the tensor may be rounding noise of the group. (Below 1e-5 of the largest entry of the group,
            or the tolerance if that is less, it is; then the largest entry is its magnitude.)
        excused: `relative` is more than the tolerance, and the plain model rounds as much: against the same model in a wider dtype the
            rewritten one is no worse than 4 times the plain one, or than the median of the plain one's group.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    magnitude: float
    absolute: float
    relative: float
    allowed: float
    floored: bool = False
    excused: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is the same."""
        return self.excused or self.relative <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is None."""
        numbers = {name: _finite(getattr(self, name)) for name in ("magnitude", "absolute", "relative", "allowed")}
        return asdict(self) | {"shape": list(self.shape)} | numbers | {"ok": self.ok}


def tolerance_of(dtype: torch.dtype) -> float:
    """The default tolerance of a model that computes in `dtype`."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def differences(
    got: Observation,
    want: Observation,
    tolerance: float,
    *,
    exact: Observation | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> Iterator[Difference]:
    """Every tensor of `want` beside that of `got`.

    Parameters and buffers that only `got` has are those that the rewrite added; they are left out.

    Args:
        got: of the rewritten model.
        want: of the plain one.
        tolerance: largest relative error.
        exact: of the plain model in a wider dtype, which says how much `want` itself is rounded.
        dtype: of the model; some of its tensors may have others.
        prefix: put before the names of the groups.
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
        if group == "gradients":  # none is the same as zero, and something else is not
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
    """The deviation of each tensor of one group.

    Args:
        got: tensors of the rewritten model.
        want: those of the plain one.
        tolerance: largest relative error.
        group: what they are.
        share: magnitudes count as at least this share of the largest of all in `want`.
        exact: those of the plain model in a wider dtype.
        dtype: of the model.
    """
    largest = max((_magnitude(value) for value in want.values()), default=0.0) if share else 0.0
    floor, noise = share * largest, min(tolerance, _NOISE) * largest
    scales = {name: largest if 0 < _magnitude(value) <= noise else _scale(value, floor) for name, value in want.items()}
    rounding = _rounding(want, exact or {}, scales, _FOREIGN.get(dtype, 0.0))
    usual = statistics.median(rounding.values()) if rounding else 0.0
    for name, value in want.items():
        other, scale = got.get(name), scales[name]
        magnitude, absolute = _magnitude(value), distance(other, value)
        excused = (
            not absolute / scale <= tolerance
            and name in rounding
            and other is not None
            and exact is not None
            and distance(other.to(exact[name].dtype), exact[name]) / scale <= EXCUSE * max(rounding[name], usual)
        )
        yield Difference(
            group,
            name,
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            magnitude,
            absolute,
            absolute / scale,
            tolerance,
            0 < magnitude < floor,
            excused,
        )


def distance(got: Tensor | None, want: Tensor) -> float:
    """Largest absolute error; infinite where the value is missing, has another shape or dtype, or is not finite elsewhere."""
    if got is None or got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    finite = torch.isfinite(want)  # a mask of -inf among the outputs must be the same mask
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    error = (got[finite].double() - want[finite].double()).abs().max().item()
    return error if error == error else float("inf")  # NaN: got is not finite where want is


def _rounding(
    want: Mapping[str, Tensor], exact: Mapping[str, Tensor], scales: Mapping[str, float], foreign: float
) -> dict[str, float]:
    """The relative error of the plain tensors themselves, where the wider dtype is the same computation."""
    found = {}
    for name, value in want.items():
        wider = exact.get(name)
        if wider is not None and value.shape == wider.shape and value.is_floating_point():
            error = distance(value.to(wider.dtype), wider) / scales[name]
            if error <= foreign:
                found[name] = error
    return found


def _scale(value: Tensor, floor: float) -> float:
    return max(_magnitude(value), floor, 1e-30) if value.is_floating_point() or value.is_complex() else 1.0


def _magnitude(value: Tensor) -> float:
    if not value.numel():
        return 0.0
    value = torch.view_as_real(value) if value.is_complex() else value
    finite = value[torch.isfinite(value)]
    return float(finite.double().abs().max().item()) if finite.numel() else 0.0


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") and value == value else None
