"""Compare a rewritten model with the plain one: outputs, buffers, written inputs, gradients."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.capture.tensor_tree import cast
from mhc_compile.errors import MhcWarning
from mhc_compile.inspection.verification.comparison import FLOOR, compare, record_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mhc_compile.inspection.verification.comparison import RunRecord
    from mhc_compile.inspection.verification.results import Difference
    from mhc_compile.tools.zoo.family import Case, Family


@dataclass(frozen=True)
class Errors:
    """Largest relative deviations, and the names of the values that deviate most."""

    forward: float
    gradients: float
    worst_output: str
    worst_gradient: str


def preservation(family: Family, case: Case, options: Mapping[str, Any]) -> Errors:
    """Compare a forward and backward pass of the plain and the compiled model, seeded alike.

    Parameters that the rewrite adds have no counterpart and are left out.

    Args:
        family: says whether to compare in float64 and to differentiate the inputs.
        case: a model of the family, in the mode to compare in. Stays compiled.
        options: of the backend; `inner_backend` is "eager" by default.

    Raises:
        ValueError: a value of the plain model is NaN.
        Exception: any error that the model raises in either form.
    """
    model, args, kwargs = case
    if family.double:
        model, args, kwargs = model.double(), cast(args, torch.float64), cast(kwargs, torch.float64)
    twin = copy.deepcopy(model)
    want = record_run(twin, twin, args, kwargs, differentiable_inputs=family.differentiable_inputs)
    undefined = [name for name, value in {**_values(want), **_gradients(want)}.items() if value.isnan().any()]
    if undefined:
        raise ValueError(f"the plain model gives NaN in {', '.join(undefined[:3])}: there is nothing to compare with")
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MhcWarning)  # the count of sites says that nothing was rewritten
        got = record_run(compiled, model, args, kwargs, differentiable_inputs=family.differentiable_inputs)
    before, after = ({f"buffer {name}": value for name, value in run.buffers.items()} for run in (want, got))
    buffers = compare(after, before, 0.0, "buffers", share=FLOOR)
    outputs = [*compare(_values(got), _values(want), 0.0, "values"), *buffers]
    gradients = list(compare(_gradients(got), _gradients(want), 0.0, "gradients", share=FLOOR))
    (forward, output), (backward, gradient) = _worst(outputs), _worst(gradients)
    return Errors(forward, backward, output, gradient)


def _values(seen: RunRecord) -> dict[str, Tensor]:
    return {name: value for name, value in (seen.outputs | seen.inputs).items() if value.is_floating_point()}


def _gradients(seen: RunRecord) -> dict[str, Tensor]:
    return seen.gradients | seen.input_gradients


def _worst(compared: list[Difference]) -> tuple[float, str]:
    worst = max(compared, key=lambda difference: difference.relative, default=None)
    return (worst.relative, worst.name) if worst is not None else (0.0, "")
