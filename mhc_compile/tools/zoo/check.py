"""Check one family: compare found with expected structure, and rewritten with plain results."""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from mhc_compile.capture.tensor_tree import cast
from mhc_compile.config.options import Options
from mhc_compile.errors import MhcWarning
from mhc_compile.inspection.explain.explain import explain
from mhc_compile.inspection.verification.comparison import differences, record_run
from mhc_compile.passes import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.inspection.verification.results import Difference
    from mhc_compile.tools.zoo.family import Case, Expected, Family, Mode

log = logging.getLogger(__name__)

#: "deviates": other structure or numbers than expected. "failed": the model could not be traced or
#: run. "skipped": its package is missing.
Status = Literal["ok", "deviates", "failed", "skipped"]


@dataclass
class Outcome:
    """The result of checking one family in one mode; lengths of chains are longest first."""

    name: str
    mode: Mode
    layers: int
    expected_sites: int = 0  # that should be rewritten with these options
    expected_chains: tuple[int, ...] = ()  # the lengths of their chains
    graphs: int = 0  # that Dynamo captured
    sites: int = 0  # that are rewritten
    chains: tuple[int, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)  # skipped additions by reason
    error_forward: float | None = None  # largest relative one of an output, buffer or written input
    error_gradients: float | None = None  # largest relative one of a gradient; None: not measured
    seconds: float = 0.0  # of the whole check
    status: Status = "ok"
    message: str = ""  # one line that says what is wrong

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"rejected": dict(self.rejected)}

    def complain(self, message: str) -> None:
        """Record a deviation, unless the message is empty."""
        if message:
            self.status = "deviates"
            self.message = f"{self.message}; {message}" if self.message else message


def check(
    family: Family,
    *,
    layers: int = 2,
    mode: Mode = "train",
    options: Mapping[str, Any] | None = None,
    preserve: bool = True,
) -> Outcome:
    """Analyze the family's graphs and, with `preserve`, run it plain and compiled.

    `options` are those of the backend, with `inner_backend` "eager" by default; wrong ones are an
    OptionError. Errors of the model are recorded in the outcome and not raised.
    """
    given = dict(options or {})
    expected, min_chain_length = family.expected(layers, mode), Options.parse(given).min_chain_length
    chains = expected.rewritten(min_chain_length)
    outcome = Outcome(family.name, mode, layers, expected_sites=sum(chains), expected_chains=chains)
    if family.needs != "torch" and importlib.util.find_spec(family.needs) is None:
        outcome.status, outcome.message = "skipped", f"needs {family.needs}"
        return outcome
    torch.compiler.reset()
    started = time.monotonic()
    try:
        _compare_structure(family, outcome, given, expected, min_chain_length)
        if preserve:
            _compare_numbers(family, outcome, given)
    except Exception as error:  # one broken model, in whatever way, must not end a run over all families
        log.debug("%s in %s mode failed", family.name, mode, exc_info=True)
        outcome.status, outcome.message = "failed", _one_line(error)
    finally:
        torch.compiler.reset()
        outcome.seconds = time.monotonic() - started
    return outcome


def deviation(chains: tuple[int, ...], rejected: Counter[str], expected: Expected, min_chain_length: int = 2) -> str:
    """Return one line that says how a structure differs from the expected one, or "".

    `chains` are the lengths that were found, longest first, `rejected` the numbers by reason.
    """
    want = expected.rewritten(min_chain_length)
    if chains != want:
        hint = f" ({expected.note})" if expected.note else ""
        return f"chains {_join(chains)}, expected {_join(want)}{hint}"
    skipped, short = rejected[Reason.CHAIN_TOO_SHORT.value], expected.too_short(min_chain_length)
    if skipped < short:
        return f"{skipped} sites in chains that are too short, expected {short}"
    if expected.reasons is not None:
        allowed = {reason.value for reason in expected.reasons}
        others = sorted(set(rejected) - allowed)
        if others or not rejected:
            return f"rejected as {', '.join(others) or 'nothing'}, expected {' or '.join(sorted(allowed))}"
    return ""


def _compare_structure(
    family: Family, outcome: Outcome, options: Mapping[str, Any], expected: Expected, min_chain_length: int
) -> None:
    model, args, kwargs = family.build(outcome.layers)
    explanation = explain(model.train(outcome.mode == "train"), *args, options=options, **kwargs)
    outcome.graphs, outcome.sites = len(explanation.graphs), len(explanation.sites)
    outcome.chains = tuple(sorted((len(chain.sites) for chain in explanation.chains), reverse=True))
    outcome.rejected = explanation.reasons
    outcome.complain(deviation(outcome.chains, outcome.rejected, expected, min_chain_length))


def _compare_numbers(family: Family, outcome: Outcome, options: Mapping[str, Any]) -> None:
    torch.compiler.reset()
    model, args, kwargs = family.build(outcome.layers)
    worst = preservation(family, (model.train(outcome.mode == "train"), args, kwargs), options)
    outcome.error_forward, outcome.error_gradients = (one.relative for one in worst)
    for one in worst:
        if not one.relative <= family.tolerance:
            name = f"buffer {one.name}" if one.group == "buffers" else one.name
            outcome.complain(f"{name} deviates by {one.relative:.1e}, allowed {family.tolerance:.0e}")


def preservation(family: Family, case: Case, options: Mapping[str, Any]) -> tuple[Difference, Difference]:
    """Compare a forward and backward pass of the plain and the compiled model, seeded alike.

    `case` is in the mode to compare in; its model stays compiled. Return the worst deviation of an
    output, buffer or written input, and that of a gradient. Raise what the model raises, and
    ValueError if a value of the plain model is NaN.
    """
    model, args, kwargs = case
    if family.double:
        model, args, kwargs = model.double(), cast(args, torch.float64), cast(kwargs, torch.float64)
    twin = copy.deepcopy(model)
    want = record_run(twin, twin, args, kwargs, differentiable_inputs=family.differentiable_inputs)
    values = want.outputs | want.inputs | want.gradients | want.input_gradients
    undefined = [name for name, value in values.items() if value.isnan().any()]
    if undefined:
        raise ValueError(f"the plain model gives NaN in {', '.join(undefined[:3])}: there is nothing to compare with")
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MhcWarning)  # the count of sites says that nothing was rewritten
        got = record_run(compiled, model, args, kwargs, differentiable_inputs=family.differentiable_inputs)
    found = sorted(differences(got, want, 0.0), key=lambda one: one.relative)
    *_, forward = (one for one in found if "gradients" not in one.group)
    *_, gradient = (one for one in found if "gradients" in one.group)
    return forward, gradient


def _join(lengths: tuple[int, ...]) -> str:
    return " + ".join(map(str, lengths)) or "none"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
