"""A family of models: how to build one of any depth, and its residual structure as a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from mhc_compile.passes import Reason

Mode: TypeAlias = Literal["train", "eval"]

#: A model and how it is called: `model(*args, **kwargs)`.
Case: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Expected:
    """The residual structure of a model, derived from its source and not from the finder.

    Attributes:
        chains: lengths of the runs of residual adds whose skip is the previous sum, directly or
            through operations that are cheap to apply to every stream: views, casts, dropout,
            scales, norms, activations, slices, pads, pooling. Includes runs of one, which
            `min_chain_length` excludes by default.
        reasons: for traps, the reasons that skipped additions may be rejected with. None if any.
        note: context for a reader of a deviation.
        pieces: lengths of the parts that the graphs of a split model hold of chains that run
            through several graphs; none is too short.
    """

    chains: tuple[int, ...] = ()
    reasons: frozenset[Reason] | None = None
    note: str = ""
    pieces: tuple[int, ...] = ()

    def rewritten(self, min_chain_length: int) -> tuple[int, ...]:
        """Return the lengths of the chains that are long enough to be rewritten, longest first."""
        long = [length for length in self.chains if length >= min_chain_length]
        return tuple(sorted((*long, *self.pieces), reverse=True))

    def too_short(self, min_chain_length: int) -> int:
        """Return the number of sites that are skipped because their chain is short."""
        return sum(length for length in self.chains if length < min_chain_length)


Expect: TypeAlias = Callable[[int, Mode], Expected]


@dataclass(frozen=True)
class Family:
    """A kind of model, at any depth.

    `make` maps the number of layers to a randomly initialised model with inputs, and downloads
    nothing; `expected` maps the number of layers and the mode to the structure.
    """

    name: str
    make: Callable[[int], Case]
    expected: Expect
    needs: Literal["torch", "transformers"] = "torch"  # the package that defines the model
    tolerance: float = 1e-5  # largest relative error of an output or gradient
    double: bool = False  # compare in float64
    because: str = ""  # why `tolerance`, `double` or `differentiable_inputs` is not the default
    differentiable_inputs: bool = True  # compare their gradients too; off if the model writes to them
    group: str = ""  # the theme, a key of `FAMILIES` in its module; filled in by `zoo.get`

    def build(self, layers: int) -> Case:
        """Return the model with its inputs: always the same numbers. Keeps the global RNG state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = self.make(layers)
        return model, args, kwargs


def chains(formula: Callable[[int], tuple[int, ...]], *, note: str = "") -> Expect:
    """Return chains that do not depend on the mode: `chains(lambda n: (n, n - 1))`."""
    return lambda layers, _mode: Expected(formula(layers), note=note)


def per_layer(*sites: int, reasons: tuple[Reason, ...] | None = None) -> Expect:
    """Return one chain for each number in `sites`, of so many sites a layer."""
    allowed = None if reasons is None else frozenset(reasons)
    return lambda layers, _mode: Expected(tuple(k * layers for k in sites), allowed)
