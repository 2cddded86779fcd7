"""The residual add `x + f(x)` in many spellings: in place, by addcmul, through casts and views."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, FeedForward, Square, Stack, formula, network, parameter, spelled, vectors,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Family, per_layer


def _augmented(block: Any, x: Tensor) -> Tensor:
    """`y += x` on the branch."""
    y = block.f(x)
    y += x
    return y


def _statement(block: Any, x: Tensor) -> Tensor:
    """`y.add_(x)` as a statement: no use of its result, only of y."""
    y = block.f(x)
    y.add_(x)
    return y


def _on_trunk(block: Any, x: Tensor) -> Tensor:
    """`x += f(x)`: the trunk loses its old value, which autograd does not save for the ReLU."""
    x += block.f(x)
    return x


def _activated(block: Any, x: Tensor) -> Tensor:
    """`relu_(x + f(x))`: the sum is overwritten by its activation."""
    y = block.f(x)
    y += x
    return F.relu(y, inplace=True)


def _flattened(block: Any, x: Tensor) -> Tensor:
    """`x + f(x)` on [B·T, C] in the block, [B, T, C] between blocks."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows + block.f(rows)).view(x.shape)


def _transposed(block: Any, x: Tensor) -> Tensor:
    """`x + f(x)` on [T, B, C] in the block, [B, T, C] between blocks."""
    x = x.transpose(0, 1)
    return (x + block.f(x)).transpose(0, 1)


_branch = partial(spelled, f=FeedForward)
_ON_TRUNK = formula("augmented-trunk", _on_trunk, f=lambda: nn.Sequential(nn.ReLU(), Square()))
_WIDE = formula(
    "promoted-sum",
    lambda block, x: x.double() + block.f(x.float()),
    doc="The trunk is float64, the branch float32: the sum promotes.",
    f=FeedForward,
)
_FLOAT = formula("float", lambda _, x: x.float(), doc="A cast to float32 as a layer.")


def _promoted(layers: int) -> nn.Module:
    return nn.Sequential(INTO(), *(_WIDE() for _ in range(layers)), _FLOAT(), OUT())


FAMILIES: dict[str, tuple[Family, ...]] = {
    "spelling": (
        _branch("branch-first", lambda block, x: block.f(x) + x, doc="`f(x) + x`."),
        _branch("augmented-branch", _augmented),
        _branch("add-statement", _statement),
        Family("augmented-trunk", vectors(_ON_TRUNK), per_layer(1)),
        _branch("add-alpha", lambda block, x: torch.add(x, block.f(x), alpha=0.5),
                doc="`torch.add(x, f(x), alpha=0.5)`."),
        _branch("addcmul", lambda block, x: torch.addcmul(x, block.g, block.f(x)),
                doc="`torch.addcmul(x, g, f(x))`: the layer scale inside the add.", g=parameter(0.3)),
        _branch("affine-addcmul", lambda block, x: x + block.f(torch.addcmul(block.shift, block.scale, x)),
                doc="ResMLP: the norm is `torch.addcmul(shift, scale, x)`, with a parameter in the place of a skip.",
                scale=parameter(), shift=parameter(0.0)),
        _branch("subtracted", lambda block, x: x - block.f(x), doc="`x - f(x)`: an add of the negated branch."),
        _branch("python-sum", lambda block, x: sum(f(x) for f in (block.f, block.g)) + x,
                doc="`sum([f(x), g(x)]) + x`: Python's sum begins with 0.", g=FeedForward),
        _branch("stacked-branches", lambda block, x: x + torch.stack([block.f(x), block.g(x)]).sum(0),
                doc="`x + torch.stack([f(x), g(x)]).sum(0)`.", g=FeedForward),
        _branch("activated-in-place", _activated),
        _branch("flattened-trunk", _flattened),
        _branch("tokens-first", _transposed),
        _branch("cast-skip", lambda block, x: (x.double() + block.f(x).double()).float(),
                doc="The skip is cast to float64 for the add, and the sum back to float32."),
        _branch("clamped-sum", lambda block, x: (x + block.f(x)).clamp(-60.0, 60.0),
                doc="`clamp(x + f(x))`, as half precision models guard against overflow."),
        _branch("quantizable-add", lambda block, x: block.join.add_relu(x, block.f(x)),
                doc="The add is a module, as quantisation expects it.", join=torch.ao.nn.quantized.FloatFunctional),
        Family("promoted-sum", network(_promoted), per_layer(1)),
        Family("written-input", network(Stack(_ON_TRUNK), (2, 5, WIDTH)), per_layer(1), differentiable_inputs=False,
               because="the model writes into its input"),
    ),
}  # fmt: skip
