"""Check one family: compare found with expected structure, and rewritten with plain results."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mhc_compile.config.options import Options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.tools.zoo.family import Expected, Family, Mode

log = logging.getLogger(__name__)

#: "deviates": other structure or numbers than expected. "failed": the model could not be traced or
#: run. "skipped": its package is missing.
Status = Literal["ok", "deviates", "failed", "skipped"]


@dataclass
class Outcome:
    """The result of checking one family in one mode.

    Attributes:
        name: of the family.
        mode: "train" or "eval".
        layers: the depth of the model.
        expected_sites: number of sites that should be rewritten with these options.
        expected_chains: the lengths of their chains, longest first.
        graphs: number of graphs that Dynamo captured.
        sites: number of sites that are rewritten.
        chains: the lengths of their chains, longest first.
        rejected: number of skipped additions, by reason.
        error_forward: largest relative deviation of an output, a buffer or an input that the model
            writes; None if not measured.
        error_gradients: largest relative deviation of a gradient; None if not measured.
        seconds: duration of the whole check.
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

    Errors of the model are recorded in the outcome and not raised.

    Args:
        family: see `zoo.get`.
        layers: the depth.
        mode: in which mode the model is traced and run.
        options: of the backend; `inner_backend` is "eager" by default.
        preserve: compare outputs and gradients as well.

    Raises:
        OptionError: the options are wrong.
    """
    import torch

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

    Args:
        chains: the lengths that were found, longest first.
        rejected: number of skipped additions, by reason.
        expected: the structure of the source.
        min_chain_length: chains shorter than this are skipped.
    """
    from mhc_compile.passes import Reason

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
    from mhc_compile.inspection.explain.explain import explain

    model, args, kwargs = family.build(outcome.layers)
    explanation = explain(model.train(outcome.mode == "train"), *args, options=options, **kwargs)
    outcome.graphs, outcome.sites = len(explanation.graphs), len(explanation.sites)
    outcome.chains = tuple(sorted((len(chain.sites) for chain in explanation.chains), reverse=True))
    outcome.rejected = explanation.reasons
    outcome.complain(deviation(outcome.chains, outcome.rejected, expected, min_chain_length))


def _compare_numbers(family: Family, outcome: Outcome, options: Mapping[str, Any]) -> None:
    import torch

    from mhc_compile.tools.zoo.preservation import preservation

    torch.compiler.reset()
    model, args, kwargs = family.build(outcome.layers)
    errors = preservation(family, (model.train(outcome.mode == "train"), args, kwargs), options)
    outcome.error_forward, outcome.error_gradients = errors.forward, errors.gradients
    for name, error in ((errors.worst_output, errors.forward), (errors.worst_gradient, errors.gradients)):
        if not error <= family.tolerance:
            outcome.complain(f"{name} deviates by {error:.1e}, allowed {family.tolerance:.0e}")


def _join(lengths: tuple[int, ...]) -> str:
    return " + ".join(map(str, lengths)) or "none"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
