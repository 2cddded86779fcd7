"""What the zoo knows about a family of models: how a tiny one is built, and what its residual structure is, as formulas in the number of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.passes import Reason

__all__ = ["MODES", "Case", "Expect", "Expected", "Family", "Mode", "chains", "no_chain"]

Mode: TypeAlias = Literal["train", "eval"]
MODES: tuple[Mode, ...] = ("train", "eval")

#: A model and how it is called: `model(*args, **kwargs)`.
Case: TypeAlias = tuple["nn.Module", tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Expected:
    """The residual structure of a model, read in its source and not in what the finder says.

    Attributes:
        chains: lengths of the runs of residual adds whose skip is the sum before, directly or through operations that are cheap to run on every
            stream: views, casts, dropout, scales, norms, activations, slices, pads, pooling. A run of one is listed too, although
            `min_chain_length` leaves it alone by default.
        projected: merges whose skip passes through a convolution or a matrix product. They end a chain and are not rewritten.
        reasons: for traps, the codes that every addition which is left alone must have one of. None where they are not the point.
        note: what a reader of a deviation should know.
        pieces: lengths of what the graphs of a model in pieces have of chains that run through several graphs; none is too short.
    """

    chains: tuple[int, ...] = ()
    projected: int = 0
    reasons: frozenset[Reason] | None = None
    note: str = ""
    pieces: tuple[int, ...] = ()

    @property
    def sites(self) -> int:
        """Residual adds with an identity skip, in chains of any length."""
        return sum(self.chains) + sum(self.pieces)

    def rewritten(self, min_chain_length: int) -> tuple[int, ...]:
        """The chains that are long enough to be rewritten, the longest first."""
        long = [length for length in self.chains if length >= min_chain_length]
        return tuple(sorted((*long, *self.pieces), reverse=True))

    def too_short(self, min_chain_length: int) -> int:
        """The sites that are left alone because their chain is short."""
        return sum(length for length in self.chains if length < min_chain_length)


Expect: TypeAlias = Callable[[int, Mode], Expected]


@dataclass(frozen=True)
class Family:
    """A kind of model, at any depth.

    Attributes:
        name: as `mhc zoo NAME` takes it.
        group: the theme, which is the name of its module.
        make: the number of layers to a randomly initialised model with inputs. Downloads nothing.
        expected: the number of layers and the mode to the structure.
        needs: the package that it comes from.
        tolerance: largest relative error of an output or gradient.
        double: compare in float64.
        because: why `tolerance` or `double` differ from the default.
        differentiable_inputs: gradients of floating-point inputs are compared too. Off where the model writes into its inputs.
    """

    name: str
    group: str
    make: Callable[[int], Case]
    expected: Expect
    needs: Literal["torch", "transformers"] = "torch"
    tolerance: float = 1e-5
    double: bool = False
    because: str = ""
    differentiable_inputs: bool = True

    def build(self, layers: int) -> Case:
        """The model with its inputs, the same numbers every time. The caller's random numbers go on undisturbed."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = self.make(layers)
        return model, args, kwargs


def no_chain(layers: int) -> tuple[int, ...]:  # noqa: ARG001
    """The formula of a model without residual adds."""
    return ()


def chains(formula: Callable[[int], tuple[int, ...]], *, projected: int = 0, note: str = "") -> Expect:
    """Chains that are the same in training and in eval mode: `chains(lambda n: (2 * n,))`."""
    return lambda layers, mode: Expected(formula(layers), projected, note=note)  # noqa: ARG005
