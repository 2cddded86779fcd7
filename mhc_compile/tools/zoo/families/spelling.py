"""The residual add `x + f(x)` in the ways in which people write it: in place, as a statement, with alpha, by addcmul, through casts and views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, FeedForward, vectors
from mhc_compile.tools.zoo.family import Case, Family, chains

__all__ = ["FAMILIES"]


class Spelled(nn.Module):
    """The branch; subclasses say how it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.f = FeedForward()


class BranchFirst(Spelled):
    """`f(x) + x`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x


class Augmented(Spelled):
    """`y += x` on the branch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return y


class Statement(Spelled):
    """`y.add_(x)` as a statement: no use of its result, only of y."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y.add_(x)
        return y


class OnTrunk(nn.Module):
    """`x += f(x)`: the trunk itself is written, and its old value is gone. The branch begins with what autograd saves no input of."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x += self.f(x)
        return x


class Alpha(Spelled):
    """`torch.add(x, f(x), alpha=0.5)`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.5)


class Fused(Spelled):
    """`torch.addcmul(x, g, f(x))`: the layer scale inside the add."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.g, self.f(x))


class Affine(Spelled):
    """ResMLP: the norm is `torch.addcmul(shift, scale, x)`, which has parameters where an add has its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(torch.addcmul(self.shift, self.scale, x))


class Subtracted(Spelled):
    """`x - f(x)`: an add of the negated branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class Summed(Spelled):
    """`sum([f(x), g(x)]) + x`: Python's sum begins with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.g = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return sum(f(x) for f in (self.f, self.g)) + x


class Stacked(Summed):
    """`x + torch.stack([f(x), g(x)]).sum(0)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([self.f(x), self.g(x)]).sum(0)


class ActivatedInPlace(Spelled):
    """`relu_(x + f(x))`: the sum is overwritten by its activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return F.relu(y, inplace=True)


class Flattened(Spelled):
    """The trunk is [B·T, C] in the block and [B, T, C] between blocks."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return (rows + self.f(rows)).view(x.shape)


class Transposed(Spelled):
    """The trunk is [T, B, C] in the block and [B, T, C] between blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return (x + self.f(x)).transpose(0, 1)


class Wide(Spelled):
    """The trunk is float64, the branch float32: the sum promotes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double() + self.f(x.float())


class Cast(Spelled):
    """The skip is cast to float64 for the add, and the sum back to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() + self.f(x).double()).float()


class Clamped(Spelled):
    """`clamp(x + f(x))`, as half precision models guard against overflow."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)).clamp(-60.0, 60.0)


class Quantizable(Spelled):
    """The add is a module of its own, as quantisation wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.join = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.join.add_relu(x, self.f(x))


class Float(nn.Module):
    """A cast to float32 as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _writer(layers: int) -> Case:
    """The caller's own input is the trunk, and is written by every block."""
    return nn.Sequential(*(OnTrunk() for _ in range(layers))), (torch.randn(2, 5, WIDTH),), {}


def _promoted(layers: int) -> Case:
    blocks = [Wide() for _ in range(layers)]
    return nn.Sequential(nn.Linear(8, WIDTH), *blocks, Float(), nn.Linear(WIDTH, 4)), (torch.randn(2, 5, 8),), {}


_GROUP, _ONE = "spelling", chains(lambda n: (n,))
_KINDS: dict[str, type[nn.Module]] = {
    "branch-first": BranchFirst,
    "augmented-branch": Augmented,
    "add-statement": Statement,
    "augmented-trunk": OnTrunk,
    "add-alpha": Alpha,
    "addcmul": Fused,
    "affine-addcmul": Affine,
    "subtracted": Subtracted,
    "python-sum": Summed,
    "stacked-branches": Stacked,
    "activated-in-place": ActivatedInPlace,
    "flattened-trunk": Flattened,
    "tokens-first": Transposed,
    "cast-skip": Cast,
    "clamped-sum": Clamped,
    "quantizable-add": Quantizable,
}
FAMILIES: tuple[Family, ...] = (
    *(Family(name, _GROUP, vectors(kind), _ONE) for name, kind in _KINDS.items()),
    Family("promoted-sum", _GROUP, _promoted, _ONE),
    Family(
        "written-input", _GROUP, _writer, _ONE, differentiable_inputs=False, because="the model writes into its input"
    ),
)
