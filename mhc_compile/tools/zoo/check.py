"""One family, checked: what the finder sees beside what the source says, and the rewritten model beside the plain one."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mhc_compile.config.options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.tools.zoo.family import Expected, Family, Mode

__all__ = ["Outcome", "Status", "check", "deviation"]

#: "deviates": another structure or other numbers than expected. "failed": the model could not be traced or run. "skipped": its package is missing.
Status = Literal["ok", "deviates", "failed", "skipped"]


@dataclass
class Outcome:
    """What came of one family in one mode.

    Attributes:
        name: of the family.
        mode: "train" or "eval".
        layers: the depth that it was built with.
        expected_sites: what would be rewritten by its source, with these options.
        expected_chains: the lengths of their chains, the longest first.
        graphs: the graphs that Dynamo made.
        sites: what is rewritten.
        chains: the lengths of their chains, the longest first.
        rejected: additions left alone, by reason.
        error_forward: largest relative deviation of an output, a buffer or an input that the model writes; None if it was not measured.
        error_gradients: of a gradient.
        seconds: for everything.
        status: see `Status`.
        message: "" or one line that says what is wrong.
    """

    name: str
    mode: Mode
    layers: int
    expected_sites: int = 0
    expected_chains: tuple[int, ...] = ()
    graphs: int = 0
    sites: int = 0
    chains: tuple[int, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)
    error_forward: float | None = None
    error_gradients: float | None = None
    seconds: float = 0.0
    status: Status = "ok"
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"rejected": dict(self.rejected)}


def check(
    family: Family,
    *,
    layers: int = 2,
    mode: Mode = "train",
    options: Mapping[str, Any] | None = None,
    preserve: bool = True,
) -> Outcome:
    """Studies the family's graphs and, with `preserve`, runs it plain and compiled. Nothing that the model does wrong is raised.

    Args:
        family: see `zoo.get`.
        layers: the depth.
        mode: in which mode the model is traced and run.
        options: of the backend; `inner_backend` is "eager" unless they say otherwise.
        preserve: compare the numbers as well.

    Raises:
        OptionError: the options are wrong.
    """
    import torch

    given = dict(options or {})
    min_chain_length = Options.parse(given).min_chain_length
    expected = family.expected(layers, mode)
    chains = expected.rewritten(min_chain_length)
    outcome = Outcome(family.name, mode, layers, expected_sites=sum(chains), expected_chains=chains)
    if family.needs != "torch" and importlib.util.find_spec(family.needs) is None:
        outcome.status, outcome.message = "skipped", f"needs {family.needs}"
        return outcome
    torch.compiler.reset()
    started = time.monotonic()
    try:
        _study(family, outcome, given, expected, min_chain_length)
        if preserve:
            _preserve(family, outcome, given)
    except Exception as error:
        outcome.status, outcome.message = "failed", _one_line(error)
    finally:
        torch.compiler.reset()
        outcome.seconds = time.monotonic() - started
    return outcome


def _study(
    family: Family, outcome: Outcome, options: Mapping[str, Any], expected: Expected, min_chain_length: int
) -> None:
    from mhc_compile.inspection.explain.explain import explain

    model, args, kwargs = family.build(outcome.layers)
    explanation = explain(model.train(outcome.mode == "train"), *args, options=options, **kwargs)
    outcome.graphs = len(explanation.graphs)
    outcome.sites = len(explanation.sites)
    outcome.chains = tuple(sorted((len(chain.sites) for chain in explanation.chains), reverse=True))
    outcome.rejected = explanation.reasons
    _complain(outcome, deviation(outcome.chains, outcome.rejected, expected, min_chain_length))


def deviation(chains: tuple[int, ...], rejected: Counter[str], expected: Expected, min_chain_length: int = 2) -> str:
    """In what a structure differs from the expected one, in one line; "" if it does not.

    Args:
        chains: the lengths that were found, the longest first.
        rejected: how many additions were left alone for each reason.
        expected: what the source says.
        min_chain_length: chains shorter than this are left alone.
    """
    from mhc_compile.passes import Reason

    want = expected.rewritten(min_chain_length)
    if chains != want:
        hint = f" ({expected.note})" if expected.note else ""
        return f"chains {_list(chains)}, expected {_list(want)}{hint}"
    alone, short = rejected[Reason.CHAIN_TOO_SHORT.value], expected.too_short(min_chain_length)
    if alone < short:
        return f"{alone} sites in chains that are too short, expected {short}"
    if expected.reasons is not None:
        allowed = {reason.value for reason in expected.reasons}
        others = sorted(set(rejected) - allowed)
        if others or not rejected:
            return f"rejected as {', '.join(others) or 'nothing'}, expected {' or '.join(sorted(allowed))}"
    return ""


def _preserve(family: Family, outcome: Outcome, options: Mapping[str, Any]) -> None:
    import torch

    from mhc_compile.tools.zoo.preservation import preservation

    torch.compiler.reset()
    model, args, kwargs = family.build(outcome.layers)
    errors = preservation(
        (model.train(outcome.mode == "train"), args, kwargs),
        options,
        double=family.double,
        differentiable_inputs=family.differentiable_inputs,
    )
    outcome.error_forward, outcome.error_gradients = errors.forward, errors.gradients
    for what, error in ((errors.worst_output, errors.forward), (errors.worst_gradient, errors.gradients)):
        if not error <= family.tolerance:
            _complain(outcome, f"{what} deviates by {error:.1e}, allowed {family.tolerance:.0e}")


def _complain(outcome: Outcome, message: str) -> None:
    if message:
        outcome.status = "deviates"
        outcome.message = f"{outcome.message}; {message}" if outcome.message else message


def _list(lengths: tuple[int, ...]) -> str:
    return " + ".join(map(str, lengths)) or "none"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
