"""The arguments of the fused operators, grouped and named, in the order of their schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Old(NamedTuple):
    """The streams of the site that ends, the output of its branch, and its coefficients."""

    streams: Tensor
    branch: Tensor
    post: Tensor
    res: Tensor


class SiteParameters(NamedTuple):
    """The parameters of the site that begins."""

    phi: Tensor
    bias: Tensor
    scale: Tensor


class Settings(NamedTuple):
    """The convention, as a string, and its numbers."""

    mapping: str
    iterations: int
    eps: float


class Saved(NamedTuple):
    """Results of the forward that only the backward reads."""

    pre: Tensor
    post: Tensor
    z: Tensor
    inverse: Tensor


class Gradients(NamedTuple):
    """Gradients of what a site reads; None is zero."""

    h: Tensor | None
    post: Tensor | None
    res: Tensor | None


def step(*args: Any) -> tuple[Old, SiteParameters, Settings]:
    """Group the arguments of `mhc::step`."""
    return Old(*args[:4]), SiteParameters(*args[4:7]), Settings(*args[7:])


def read_backward(*args: Any) -> tuple[Gradients, Tensor, SiteParameters, Saved, Settings]:
    """Group the arguments of `mhc::read_backward`; the second group is the streams."""
    return Gradients(*args[:3]), args[3], SiteParameters(*args[4:7]), Saved(*args[7:11]), Settings(*args[11:])


def step_backward(*args: Any) -> tuple[Tensor | None, Gradients, Old, SiteParameters, Saved, Settings]:
    """Group the arguments of `mhc::step_backward`; the first is the gradient of the new streams."""
    old, site, saved = Old(*args[4:8]), SiteParameters(*args[8:11]), Saved(*args[11:15])
    return args[0], Gradients(*args[1:4]), old, site, saved, Settings(*args[15:])
