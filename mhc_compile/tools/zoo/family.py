"""A family of models: how to build one of any depth, and its residual structure as a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.passes import Reason

Mode: TypeAlias = Literal["train", "eval"]
MODES: tuple[Mode, ...] = ("train", "eval")

#: A model and how it is called: `model(*args, **kwargs)`.
Case: TypeAlias = tuple["nn.Module", tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Expected:
    """The residual structure of a model, derived from its source and not from the finder.

    Attributes:
        chains: lengths of the runs of residual adds whose skip is the previous sum, directly or
            through operations that are cheap to apply to every stream: views, casts, dropout,
            scales, norms, activations, slices, pads, pooling. Includes runs of one, which
            `min_chain_length` excludes by default.
        projected: adds whose skip passes through a convolution or a matrix product. They end a
            chain and are not rewritten.
        reasons: for traps, the reasons that skipped additions may be rejected with. None if any.
        note: context for a reader of a deviation.
        pieces: lengths of the parts that the graphs of a split model hold of chains that run
            through several graphs; none is too short.
    """

    chains: tuple[int, ...] = ()
    projected: int = 0
    reasons: frozenset[Reason] | None = None
    note: str = ""
    pieces: tuple[int, ...] = ()

    @property
    def sites(self) -> int:
        """Number of residual adds with an identity skip, in chains of any length."""
        return sum(self.chains) + sum(self.pieces)

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

    Attributes:
        name: as `mhc zoo NAME` takes it.
        make: maps the number of layers to a randomly initialised model with inputs. Downloads
            nothing.
        expected: maps the number of layers and the mode to the structure.
        needs: the package that defines the model.
        tolerance: largest relative error of an output or gradient.
        double: compare in float64.
        because: why one of `tolerance`, `double`, `differentiable_inputs` is not the default.
        differentiable_inputs: compare gradients of floating-point inputs too. Off where the model
            writes into its inputs.
        group: the theme, a key of `FAMILIES` in its module; filled in by `zoo.families`.
    """

    name: str
    make: Callable[[int], Case]
    expected: Expect
    needs: Literal["torch", "transformers"] = "torch"
    tolerance: float = 1e-5
    double: bool = False
    because: str = ""
    differentiable_inputs: bool = True
    group: str = ""

    def build(self, layers: int) -> Case:
        """Return the model with its inputs: always the same numbers. Keeps the global RNG state."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = self.make(layers)
        return model, args, kwargs


def chains(formula: Callable[[int], tuple[int, ...]], *, projected: int = 0, note: str = "") -> Expect:
    """Return chains that do not depend on the mode: `chains(lambda n: (n, n - 1))`."""
    return lambda layers, _mode: Expected(formula(layers), projected, note=note)


def per_layer(*sites: int, reasons: tuple[Reason, ...] | None = None, projected: int = 0) -> Expect:
    """Return one chain for each number in `sites`, of so many sites a layer."""
    allowed = None if reasons is None else frozenset(reasons)
    return lambda layers, _mode: Expected(tuple(k * layers for k in sites), projected, allowed)
