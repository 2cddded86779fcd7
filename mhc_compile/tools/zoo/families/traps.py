"""Additions that look like residual adds, alone and on a trunk: none of them is rewritten."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.passes import Reason
from mhc_compile.tools.zoo.families.nanochat import Nanochat

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, WIDTH, Block, Each, FeedForward, Norm, Plain, Square, Stack, conv2d, ids, linear, network, parameter, spelled,
    wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Expect, Expected, Family, per_layer


class Embeddings(
    Block, tables=Each(partial(nn.Embedding, 31, WIDTH), lambda layers: layers + 2), head=linear(WIDTH, 31)
):  # fmt: skip
    """Token, position and type embeddings of equal shape, summed."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tables[0](ids)
        for shift, table in enumerate(self.tables[1:]):
            x = x + table((ids + shift) % 31)
        return self.head(x)


def _rotated(y: Tensor, angle: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return y * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


def _rotary(block: Any, x: Tensor) -> Tensor:
    """`q cos + rotate(q) sin`, for q and for k."""
    angle = torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH)
    q, k = (_rotated(y, angle) for y in (block.q(x), block.k(x)))
    return (q @ k.transpose(1, 2)).softmax(-1) @ block.v(x)


def _experts(block: Any, x: Tensor) -> Tensor:
    """Mixture of experts by accumulation: `out = out + weight_i expert_i(x)`, from zeros."""
    weights = block.router(x).softmax(-1)
    out = torch.zeros_like(x)
    for index, expert in enumerate(block.experts):
        out = out + weights[..., index, None] * expert(x)
    return out


def _straight_through(block: Any, x: Tensor) -> Tensor:
    """Vector quantisation: `z + (code - z).detach()`; no gradient flows through the second term."""
    z = block.f(x)
    code = F.embedding((z @ block.codes.t()).argmax(-1), block.codes)
    return z + (code - z).detach()


def _response_norm(block: Any, x: Tensor) -> Tensor:
    """ConvNeXt V2's GRN: `x + bias + weight (x n)` with a statistic n of x: no matrix product."""
    x = block.f(x)
    size = x.norm(dim=1, keepdim=True)
    return block.weight * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + block.bias + x


def _losses(block: Any, x: Tensor) -> Tensor:
    """Two losses, summed: scalars."""
    x = block.f(x)
    block.seen = (x**2).mean() + block.g(x).abs().mean()
    return x * block.seen


def _lerp(block: Any, x: Tensor) -> Tensor:
    """`torch.lerp` of two branches, and the same by hand: `(1 - t) f + t g`."""
    f, g = block.f(x), block.g(x)
    return torch.lerp(f, g, 0.3) * ((1 - 0.3) * f + 0.3 * g)


def _highway(block: Any, x: Tensor) -> Tensor:
    """`t f(x) + (1 - t) x` with a gate t that is computed from x: the skip is not x."""
    t = torch.sigmoid(block.gate(x))
    return t * block.f(x) + (1 - t) * x


def _cubic(block: Any, x: Tensor) -> Tensor:
    """GELU in its tanh form, by hand: `x + 0.044715 x³`."""
    x = block.up(x)
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def _relative_bias(block: Any, x: Tensor) -> Tensor:
    """ProphetNet, XLNet, DeBERTa: attention scores plus a bias from the same tokens."""
    scores = block.q(x) @ block.k(x).transpose(1, 2)
    return (scores + block.bias(x)).softmax(-1) @ block.v(x)


def _reparameterised(block: Any, x: Tensor) -> Tensor:
    """Variational layer: `mean(x) + noise ⊙ exp(spread(x))`."""
    mean = block.f(x)
    return mean + torch.randn_like(mean) * (0.5 * block.g(x)).exp()


def _doubled(block: Any, x: Tensor) -> Tensor:
    """`x + x`."""
    x = block.f(x)
    return x + x


def _complex(block: Any, x: Tensor) -> Tensor:
    """Complex numbers: `z + w z`."""
    z = torch.complex(x, torch.zeros_like(x))
    return (z + z @ block.w).abs()


# On a trunk: residual adds, and additions that pass every local test but are none
def _direct_path(block: Any, x: Tensor) -> Tensor:
    """State-space mixer: `scan(u) + D u` inside the branch, u the input of the scan."""
    u = F.silu(block.g(block.norm(x)))
    scanned = torch.cumsum(block.f[1](u).chunk(2, dim=-1)[0], dim=1)
    return x + block.out(scanned + block.d * u)


_NO_BIAS = linear(WIDTH, WIDTH, bias=False)


def _query_positions(block: Any, x: Tensor) -> Tensor:
    """DETR: positions are added to the trunk's value for q and k only."""
    placed = x + block.positions
    scores = block.q(placed) @ block.k(placed).transpose(1, 2)
    return x + scores.softmax(-1) @ block.v(x)


class ValueMix(Block, norm=Norm, v=Square, out=Square):
    """Value residual: every block mixes the values of the first into its own."""

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = self.v(self.norm(x))
        mixed = v if first is None else 0.5 * v + 0.5 * first
        return x + self.out(mixed.cumsum(1)), v if first is None else first


def _value_residual(net: Any, x: Tensor) -> Tensor:
    """Run `ValueMix` blocks one after the other."""
    x, first = net.into(x), None
    for block in net.blocks:
        x, first = block(x, first)
    return x


def _gated_shift(block: Any, x: Tensor) -> Tensor:
    """RWKV-6: the share of the token before is computed from both, by a gate for each feature."""
    before = F.pad(x, (0, 0, 1, -1)) - x
    return x + block.f(x + before * torch.tanh(block.gate(x + 0.5 * before)))


def _constant_shift(block: Any, x: Tensor) -> Tensor:
    """`x + 0.01 ones_like(x)` between two adds: depends on the shape of x only."""
    x = x + 0.01 * torch.ones_like(x)
    return x + block.f(x)


def _summed_states(net: Any, x: Tensor) -> dict[str, Any]:
    """Return the mean of all hidden states: each depends on the last; no sum is a residual add."""
    states: list[Tensor] = [net.into(x)]
    for block in net.blocks:
        states.append(states[-1] + block(states[-1]))
    return {"last": states[-1], "mean": sum(states[1:], states[0]) / len(states)}


class ConvBlock(Block, conv=conv2d(8, 8, 3, 1, 1)):
    """`x + conv(relu(x))` on images."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class Pyramid(nn.Module):
    """FPN over three levels of residual stages: `lateral(level) + upsampled(level above)`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stages = nn.ModuleList(Stack(ConvBlock)(layers) for _ in range(3))
        self.lateral, self.shrink = Each(conv2d(8, 6, 1))(3), Each(conv2d(8, 8, 2, 2))(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, levels = self.stem(x), []
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.shrink[index - 1](x))
            levels.append(x)
        merged = [self.lateral[-1](levels[-1])]
        for level, lateral in zip(reversed(levels[:-1]), reversed(self.lateral[:-1]), strict=True):
            merged.append(lateral(level) + F.interpolate(merged[-1], scale_factor=2.0))
        return merged


class ManyStreams(nn.Module):
    """Hyper-connections by hand: `mix · H + post ⊗ f(pre · H)` on 3 streams. Nothing to replace."""

    def __init__(self, *, dynamic: bool = False) -> None:
        super().__init__()
        self.f, self.mix = FeedForward(), nn.Parameter(torch.eye(3))
        self.to_mix = nn.Linear(WIDTH, 3) if dynamic else None
        self.pre, self.post = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.ones(3))

    def forward(self, streams: Tensor) -> Tensor:
        y = self.f(torch.einsum("n,btnc->btc", self.pre, streams))
        if self.to_mix is not None:
            mix = (self.mix + self.to_mix(streams)).softmax(-1)
            return mix @ streams + self.post[:, None] * y[:, :, None]
        return torch.einsum("mn,btnc->btmc", self.mix, streams) + self.post[:, None] * y[:, :, None]


def _hyper_connected(net: Any, x: Tensor) -> Tensor:
    """Run `ManyStreams` blocks, mixed by learned or by computed matrices."""
    return net.blocks(net.into(x)[:, :, None].expand(-1, -1, 3, -1)).mean(2)


def _two_ages(net: Any, x: Tensor) -> Tensor:
    """`f(x) + x + before`: two skips of different age; `before` is no part of the branch."""
    x = net.into(x)
    x, before = x + net.blocks[0](x), x
    for block in net.blocks[1:]:
        x, before = block(x) + x + before, x
    return x


class FirstMixed(nn.Module):
    """`a x + b x0` before every block, x0 the embedding: point by point, and x depends on x0."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.blocks = INTO(), Each(FeedForward)(layers)
        self.a, self.b = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.into(x)
        for layer, block in enumerate(self.blocks):
            x = self.a[layer] * x + self.b[layer] * first
            x = x + block(x)
        return x


def _allowed(*reasons: Reason) -> Expect:
    return per_layer(reasons=reasons)


def _one(*reasons: Reason) -> Expect:
    return per_layer(1, reasons=reasons)


def _two_sites(*reasons: Reason) -> Expect:
    return per_layer(2, reasons=reasons)


_INDEPENDENT = _allowed(Reason.INDEPENDENT)
_DOUBLE: dict[str, Any] = {"double": True, "because": "norms leave next to no gradient to scales of the whole trunk"}
_two = partial(spelled, f=Square, g=Square)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "traps": (
        Family("trap-embeddings", lambda layers: (Embeddings(layers), (ids(),), {}), _INDEPENDENT),
        spelled("trap-cubic-gelu", _cubic, expected=_allowed(Reason.NO_CONTRACTION), up=Square),
        spelled("trap-rotary", _rotary, expected=_INDEPENDENT, q=Square, k=Square, v=Square),
        spelled("trap-relative-bias", _relative_bias, expected=_INDEPENDENT, q=Square, k=Square, v=Square,
                bias=linear(WIDTH, 5)),
        _two("trap-two-branches", lambda block, x: block.f(x) + block.g(x),
             doc="`f(x) + g(x)`: both are computed, neither is a skip.", expected=_INDEPENDENT),
        _two("trap-shared-expert", lambda block, x: block.f(x) + torch.sigmoid(block.gate(x)) * block.g(x),
             doc="`experts(x) + sigmoid(gate(x)) shared(x)`, without a trunk around it.", expected=_INDEPENDENT,
             gate=linear(WIDTH, 1)),
        spelled("trap-experts", _experts, expected=_INDEPENDENT, router=linear(WIDTH, 3),
                experts=lambda: Each(Square)(3)),
        spelled("trap-token-shift", lambda block, x: block.f(x + block.mu * (F.pad(x, (0, 0, 1, -1)) - x)),
                doc="RWKV: a mix of each token with the previous one: `x + mu (before - x)`.",
                expected=_allowed(Reason.NO_CONTRACTION, Reason.INDEPENDENT), mu=parameter(0.3), f=Square),
        _two("trap-lerp", _lerp, expected=_INDEPENDENT),
        spelled("trap-highway", _highway, expected=_INDEPENDENT, gate=Square, f=Square),
        spelled("trap-straight-through", _straight_through,
                expected=_allowed(Reason.NOT_DIFFERENTIABLE, Reason.INDEPENDENT), f=Square,
                codes=lambda: nn.Parameter(torch.randn(7, WIDTH))),
        _two("trap-reparameterised", _reparameterised, expected=_allowed(Reason.NOT_DIFFERENTIABLE)),
        spelled("trap-response-norm", _response_norm, expected=_allowed(Reason.NO_CONTRACTION, Reason.BROADCAST),
                f=Square, weight=parameter(), bias=parameter(0.0)),
        spelled("trap-doubled", _doubled, expected=_allowed(Reason.SAME_VALUE), f=Square),
        spelled("trap-losses", _losses, expected=_allowed(Reason.NO_FEATURE_AXIS), f=Square, g=Square),
        spelled("trap-bias", lambda block, x: block.f(x) + block.bias, doc="A bias that is added by hand.",
                expected=_allowed(Reason.BROADCAST), f=Square, bias=lambda: nn.Parameter(torch.randn(WIDTH))),
        spelled("trap-complex", _complex, expected=_allowed(Reason.DTYPE),
                w=lambda: nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))),
    ),
    "traps_on_trunk": (
        spelled("trap-side-add", lambda block, x: x + block.f(x + block.g(x)),
                doc="Zamba: `x + f(x + g(x))`; the inner sum feeds the branch and never returns to the trunk.",
                expected=_one(Reason.SIDE_ADD), f=FeedForward, g=Square),
        spelled("trap-direct-path", _direct_path, expected=_one(Reason.SIDE_ADD), f=FeedForward, g=Square, norm=Norm,
                d=parameter(), out=Square),
        spelled("trap-shared-modulation", lambda block, x, c: x + block.f(block.norm(x) + c), (2, 5, WIDTH),
                doc="`x + f(norm(x) + c)`, c the same in every block: from the second on x depends on it.",
                expected=_one(Reason.SIDE_ADD, Reason.INDEPENDENT), norm=Norm, f=Plain),
        spelled("trap-query-positions", _query_positions, expected=_one(Reason.INDEPENDENT), q=_NO_BIAS, k=_NO_BIAS,
                v=_NO_BIAS, positions=lambda: nn.Parameter(torch.randn(2, 5, WIDTH))),
        wired("trap-value-residual", _value_residual, expected=_one(Reason.SIDE_ADD), into=INTO,
              blocks=Each(ValueMix)),
        spelled("trap-constant-shift", _constant_shift, expected=_one(Reason.NOT_DIFFERENTIABLE), f=FeedForward),
        spelled("trap-zeroed-branch", lambda block, x: x + block.f(x) * (x + torch.zeros_like(block.g(x))).mean(),
                doc="`x + zeros_like(g(x))`: a branch with a product, of which only the shape is used.",
                expected=_one(Reason.NOT_DIFFERENTIABLE), f=FeedForward, g=Square),
        spelled("trap-size-only",
                lambda block, x: x + block.f(block.g(x) + torch.full((x.size(0), x.size(1), WIDTH), 0.1)),
                doc="`h + noise of x's size`, inside the branch.", expected=_one(Reason.INDEPENDENT), f=FeedForward,
                g=Square),
        wired("trap-summed-states", _summed_states, expected=_one(Reason.LONG_SKIP, Reason.INDEPENDENT), into=INTO,
              blocks=Each(FeedForward)),
        Family("trap-pyramid", network(Pyramid, (2, 3, 8, 8)), per_layer(1, 1, 1, reasons=(Reason.PROJECTED_SKIP,))),
        wired("trap-many-streams", _hyper_connected, expected=_allowed(Reason.PROJECTED_SKIP), into=INTO,
              blocks=Stack(ManyStreams)),
        wired("trap-mixed-streams", _hyper_connected, expected=_allowed(Reason.MULTI_STREAM, Reason.BROADCAST),
              into=INTO, blocks=Stack(partial(ManyStreams, dynamic=True))),
        Family("trap-first-mixed", network(FirstMixed), _one(Reason.LONG_SKIP, Reason.INDEPENDENT)),
        Family("trap-nanochat", lambda layers: (Nanochat(layers), (ids(),), {}),
               _two_sites(Reason.TOKEN_SHIFT, Reason.LONG_SKIP, Reason.NO_CONTRACTION, Reason.INDEPENDENT), **_DOUBLE),
        Family("trap-nanochat-decoding", lambda layers: (Nanochat(layers), (ids()[:, :1], torch.randn(2, 1, WIDTH)), {}),
               _two_sites(Reason.LONG_SKIP, Reason.NO_CONTRACTION, Reason.INDEPENDENT), **_DOUBLE),
        spelled("trap-gated-shift", _gated_shift,
                expected=_one(Reason.TOKEN_SHIFT, Reason.NO_CONTRACTION, Reason.INDEPENDENT), f=FeedForward, gate=Square),
        wired("trap-two-ages", _two_ages, expected=lambda n, _: Expected((n + 1,), reasons=frozenset({Reason.LONG_SKIP})),
              into=INTO, blocks=Each(FeedForward, lambda layers: layers + 1)),
    ),
}  # fmt: skip
