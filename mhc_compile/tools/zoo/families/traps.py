"""Additions of equal shape that are no residual adds, one kind each: nothing of these models may be rewritten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.passes import Reason
from mhc_compile.tools.zoo.families.parts import WIDTH, vectors
from mhc_compile.tools.zoo.family import Expected, Family, Mode

__all__ = ["FAMILIES"]


class Linear(nn.Linear):
    """A square linear layer."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


class Embeddings(nn.Module):
    """Token, position and type embeddings of equal shape, summed."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(31, WIDTH) for _ in range(layers + 2))
        self.head = nn.Linear(WIDTH, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tables[0](ids)
        for shift, table in enumerate(self.tables[1:]):
            x = x + table((ids + shift) % 31)
        return self.head(x)


class CubicGelu(nn.Module):
    """The tanh form of GELU by hand: `x + 0.044715 x³`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


class Rotary(nn.Module):
    """`q cos + rotate(q) sin`, for q and for k."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = Linear(), Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH)
        q, k = (self._rotate(y, angle) for y in (self.q(x), self.k(x)))
        return (q @ k.transpose(1, 2)).softmax(-1) @ self.v(x)

    @staticmethod
    def _rotate(y: Tensor, angle: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


class RelativeBias(nn.Module):
    """Attention scores and a bias of equal shape that is computed from the same tokens (ProphetNet, XLNet, DeBERTa)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.bias = Linear(), Linear(), Linear(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return (scores + self.bias(x)).softmax(-1) @ self.v(x)


class TwoBranches(nn.Module):
    """`f(x) + g(x)`: both are computed, neither is a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x)


class SharedExpert(TwoBranches):
    """`experts(x) + sigmoid(gate(x)) shared(x)`, without a trunk around it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + torch.sigmoid(self.gate(x)) * self.g(x)


class Experts(nn.Module):
    """A mixture of experts by accumulation: `out = out + weight_i expert_i(x)`, from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(Linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out + weights[..., index, None] * expert(x)
        return out


class TokenShift(nn.Module):
    """RWKV: each token is mixed with the one before, point by point: `x + mu (before - x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.f = nn.Parameter(torch.full((WIDTH,), 0.3)), Linear()

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        return self.f(x + self.mu * (before - x))


class Lerp(TwoBranches):
    """`torch.lerp` of two branches, and the same by hand: `(1 - t) f + t g`."""

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.f(x), self.g(x)
        return torch.lerp(f, g, 0.3) * ((1 - 0.3) * f + 0.3 * g)


class Highway(nn.Module):
    """`t f(x) + (1 - t) x` with a gate t that is computed from x: the skip is not x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.f = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * self.f(x) + (1 - t) * x


class StraightThrough(nn.Module):
    """Vector quantisation: `z + (code - z).detach()`; no gradient takes the way of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.codes = Linear(), nn.Parameter(torch.randn(7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        z = self.f(x)
        code = F.embedding((z @ self.codes.t()).argmax(-1), self.codes)
        return z + (code - z).detach()


class Reparameterised(TwoBranches):
    """A variational layer: `mean(x) + noise ⊙ exp(spread(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.f(x)
        return mean + torch.randn_like(mean) * (0.5 * self.g(x)).exp()


class ResponseNorm(nn.Module):
    """ConvNeXt V2's GRN: `x + bias + weight (x n)` with n a statistic of x: no product with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.weight, self.bias = Linear(), nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        size = x.norm(dim=1, keepdim=True)
        return self.weight * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.bias + x


class Doubled(nn.Module):
    """`x + x`."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        return x + x


class Losses(nn.Module):
    """Two losses, summed: scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Linear(), Linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        self.seen = (x**2).mean() + self.g(x).abs().mean()
        return x * self.seen


class Biased(nn.Module):
    """A bias that is added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.bias = Linear(), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.bias


class Complex(nn.Module):
    """Complex numbers: `z + w z`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x, torch.zeros_like(x))
        return (z + z @ self.w).abs()


def _trap(name: str, block: type[nn.Module], *reasons: Reason) -> Family:
    def expected(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
        return Expected(reasons=frozenset(reasons))

    return Family(name, "traps", vectors(block), expected)


_EMBEDDINGS = Family(
    "trap-embeddings",
    "traps",
    lambda n: (Embeddings(n), (torch.arange(12).reshape(2, 6) * 5 % 31,), {}),
    lambda layers, mode: Expected(reasons=frozenset({Reason.INDEPENDENT})),  # noqa: ARG005
)
FAMILIES: tuple[Family, ...] = (
    _EMBEDDINGS,
    _trap("trap-cubic-gelu", CubicGelu, Reason.NO_CONTRACTION),
    _trap("trap-rotary", Rotary, Reason.INDEPENDENT),
    _trap("trap-relative-bias", RelativeBias, Reason.INDEPENDENT),
    _trap("trap-two-branches", TwoBranches, Reason.INDEPENDENT),
    _trap("trap-shared-expert", SharedExpert, Reason.INDEPENDENT),
    _trap("trap-experts", Experts, Reason.INDEPENDENT),
    _trap("trap-token-shift", TokenShift, Reason.NO_CONTRACTION, Reason.INDEPENDENT),
    _trap("trap-lerp", Lerp, Reason.INDEPENDENT),
    _trap("trap-highway", Highway, Reason.INDEPENDENT),
    _trap("trap-straight-through", StraightThrough, Reason.NOT_DIFFERENTIABLE, Reason.INDEPENDENT),
    _trap("trap-reparameterised", Reparameterised, Reason.NOT_DIFFERENTIABLE),
    _trap("trap-response-norm", ResponseNorm, Reason.NO_CONTRACTION, Reason.BROADCAST),
    _trap("trap-doubled", Doubled, Reason.SAME_VALUE),
    _trap("trap-losses", Losses, Reason.NO_FEATURE_AXIS),
    _trap("trap-bias", Biased, Reason.BROADCAST),
    _trap("trap-complex", Complex, Reason.DTYPE),
)
