"""`Preset`: how the hyper-connections of one system differ from those of others. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mhc_compile.config.coefficient_spec import Convention

#: The end of a chain: the mean or the sum of the streams, or a sum with learned weights.
ReadOut = Literal["mean", "sum", "learned"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The convention of one system that ships hyper-connections.

    `register_preset(Preset(...))` adds one.

    Attributes:
        name: what `options={"preset": ...}` takes.
        source: where the equations are to be found.
        convention: how coefficients are computed.
        iterations: of Sinkhorn.
        eps: added to the mean square under the root mean square.
        read_out: what ends a chain.
        single_pass: the weights `pre` of a site collapse the streams for the next site; the first
            site reads the trunk itself.
        preserves: whether the plain model is among the functions that it can start as.
    """

    name: str
    source: str
    convention: Convention = field(default_factory=Convention)
    iterations: int = 20
    eps: float = 1e-6
    read_out: ReadOut = "mean"
    single_pass: bool = False
    preserves: bool = True

    def defaults(self) -> dict[str, Any]:
        """Return the options for which this preset gives the defaults."""
        return {
            "mapping": self.convention.mapping,
            "iterations": self.iterations,
            "eps": self.eps,
            "read_out": self.read_out,
            "single_pass": self.single_pass,
            "rank": self.convention.rank,
        }
