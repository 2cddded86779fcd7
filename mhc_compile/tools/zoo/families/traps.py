"""Additions of equal shape that are no residual adds, one kind each: none of them may be rewritten."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.passes import Reason
from mhc_compile.tools.zoo.families.parts import WIDTH, Block, Each, Square, ids, linear, parameter, spelled, vectors
from mhc_compile.tools.zoo.family import Case, Expect, Family, per_layer

__all__ = ["FAMILIES"]


class Embeddings(
    Block, tables=Each(partial(nn.Embedding, 31, WIDTH), lambda layers: layers + 2), head=linear(WIDTH, 31)
):  # fmt: skip
    """Token, position and type embeddings of equal shape, summed."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tables[0](ids)
        for shift, table in enumerate(self.tables[1:]):
            x = x + table((ids + shift) % 31)
        return self.head(x)


class Rotary(Block, q=Square, k=Square, v=Square):
    """`q cos + rotate(q) sin`, for q and for k."""

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH)
        q, k = (self._rotate(y, angle) for y in (self.q(x), self.k(x)))
        return (q @ k.transpose(1, 2)).softmax(-1) @ self.v(x)

    @staticmethod
    def _rotate(y: Tensor, angle: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


class Experts(Block, router=linear(WIDTH, 3), experts=lambda: Each(Square)(3)):
    """A mixture of experts by accumulation: `out = out + weight_i expert_i(x)`, from zeros."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out + weights[..., index, None] * expert(x)
        return out


class StraightThrough(Block, f=Square, codes=lambda: nn.Parameter(torch.randn(7, WIDTH))):
    """Vector quantisation: `z + (code - z).detach()`; no gradient flows through the second term."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.f(x)
        code = F.embedding((z @ self.codes.t()).argmax(-1), self.codes)
        return z + (code - z).detach()


class ResponseNorm(Block, f=Square, weight=parameter(), bias=parameter(0.0)):
    """ConvNeXt V2's GRN: `x + bias + weight (x n)` with a statistic n of x: no matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        size = x.norm(dim=1, keepdim=True)
        return self.weight * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.bias + x


class Losses(Block, f=Square, g=Square):
    """Two losses, summed: scalars."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(x)
        self.seen = (x**2).mean() + self.g(x).abs().mean()
        return x * self.seen


def _embeddings(layers: int) -> Case:
    return Embeddings(layers), (ids(),), {}


def _lerp(block: Any, x: Tensor) -> Tensor:
    f, g = block.f(x), block.g(x)
    return torch.lerp(f, g, 0.3) * ((1 - 0.3) * f + 0.3 * g)


def _highway(block: Any, x: Tensor) -> Tensor:
    t = torch.sigmoid(block.gate(x))
    return t * block.f(x) + (1 - t) * x


def _cubic(block: Any, x: Tensor) -> Tensor:
    x = block.up(x)
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def _relative_bias(block: Any, x: Tensor) -> Tensor:
    scores = block.q(x) @ block.k(x).transpose(1, 2)
    return (scores + block.bias(x)).softmax(-1) @ block.v(x)


def _reparameterised(block: Any, x: Tensor) -> Tensor:
    mean = block.f(x)
    return mean + torch.randn_like(mean) * (0.5 * block.g(x)).exp()


def _shift(block: Any, x: Tensor) -> Tensor:
    before = F.pad(x, (0, 0, 1, -1))
    return block.f(x + block.mu * (before - x))


def _doubled(block: Any, x: Tensor) -> Tensor:
    x = block.f(x)
    return x + x


def _complex(block: Any, x: Tensor) -> Tensor:
    z = torch.complex(x, torch.zeros_like(x))
    return (z + z @ block.w).abs()


def _allowed(*reasons: Reason) -> Expect:
    return per_layer(reasons=reasons)


_INDEPENDENT = _allowed(Reason.INDEPENDENT)
_two = partial(spelled, f=Square, g=Square)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "traps": (
        Family("trap-embeddings", _embeddings, _INDEPENDENT),
        spelled("trap-cubic-gelu", "The tanh form of GELU by hand: `x + 0.044715 x³`.", _cubic,
                expected=_allowed(Reason.NO_CONTRACTION), up=Square),
        Family("trap-rotary", vectors(Rotary), _INDEPENDENT),
        spelled("trap-relative-bias",
                "ProphetNet, XLNet, DeBERTa: attention scores, and a bias of their shape from the same tokens.",
                _relative_bias, expected=_INDEPENDENT, q=Square, k=Square, v=Square, bias=linear(WIDTH, 5)),
        _two("trap-two-branches", "`f(x) + g(x)`: both are computed, neither is a skip.",
             lambda block, x: block.f(x) + block.g(x), expected=_INDEPENDENT),
        _two("trap-shared-expert", "`experts(x) + sigmoid(gate(x)) shared(x)`, without a trunk around it.",
             lambda block, x: block.f(x) + torch.sigmoid(block.gate(x)) * block.g(x),
             expected=_INDEPENDENT, gate=linear(WIDTH, 1)),
        Family("trap-experts", vectors(Experts), _INDEPENDENT),
        spelled("trap-token-shift", "RWKV: a mix of each token with the previous one: `x + mu (before - x)`.", _shift,
                expected=_allowed(Reason.NO_CONTRACTION, Reason.INDEPENDENT), mu=parameter(0.3), f=Square),
        _two("trap-lerp", "`torch.lerp` of two branches, and the same by hand: `(1 - t) f + t g`.", _lerp,
             expected=_INDEPENDENT),
        spelled("trap-highway", "`t f(x) + (1 - t) x` with a gate t that is computed from x: the skip is not x.",
                _highway, expected=_INDEPENDENT, gate=Square, f=Square),
        Family("trap-straight-through", vectors(StraightThrough),
               _allowed(Reason.NOT_DIFFERENTIABLE, Reason.INDEPENDENT)),
        _two("trap-reparameterised", "A variational layer: `mean(x) + noise ⊙ exp(spread(x))`.", _reparameterised,
             expected=_allowed(Reason.NOT_DIFFERENTIABLE)),
        Family("trap-response-norm", vectors(ResponseNorm), _allowed(Reason.NO_CONTRACTION, Reason.BROADCAST)),
        spelled("trap-doubled", "`x + x`.", _doubled, expected=_allowed(Reason.SAME_VALUE), f=Square),
        Family("trap-losses", vectors(Losses), _allowed(Reason.NO_FEATURE_AXIS)),
        spelled("trap-bias", "A bias that is added by hand.", lambda block, x: block.f(x) + block.bias,
                expected=_allowed(Reason.BROADCAST), f=Square, bias=lambda: nn.Parameter(torch.randn(WIDTH))),
        spelled("trap-complex", "Complex numbers: `z + w z`.", _complex, expected=_allowed(Reason.DTYPE),
                w=lambda: nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))),
    ),
}  # fmt: skip
