"""A tiny transformer, and mHC for it written by hand: plain torch, float64, from names and values
alone. Nothing of the package runs in `transformer_by_hand`, and neither do modules and their hooks.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from helpers.gates import faster
from torch import Tensor, nn

import mhc_compile

STREAMS, ITERATIONS, EPS = 4, 20, 1e-6
WIDTH, VOCABULARY = 8, 7
BRANCHES = ("attn", "mlp")


class Attention(nn.Module):
    """One head whose values are the tokens themselves: few operations, traced in a moment."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ x.transpose(-1, -2)).softmax(-1) @ x)


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class UntracedAttention(Attention):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class UntracedMlp(Mlp):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


UNTRACED = {Attention: UntracedAttention, Mlp: UntracedMlp}
TRACED = {untraced: kind for kind, untraced in UNTRACED.items()}


class Block(nn.Module):
    """Pre-norm: two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens [..., T] to logits [..., T, VOCABULARY]. `gain` is a number that Dynamo guards on."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.gain = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.gain


class Int8Linear(nn.Module):
    """A linear layer with weights in int8 and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        self.register_buffer("quantised", (weight / scale).round().to(torch.int8))
        self.register_buffer("row_scale", scale.to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised.to(x.dtype) * self.row_scale.to(x.dtype), self.bias)


@functools.cache
def attached_state(layers: int) -> dict[str, Tensor]:
    """The state dict of a model with hyper-connections; making one costs a trace."""
    model = Transformer(layers)
    mhc_compile.attach(model, torch.zeros(2, 4, dtype=torch.long), options={"inner_backend": "eager"})
    return model.state_dict()


def stir(model: nn.Module, generator: torch.Generator) -> None:
    """Give a model random hyper-connections, so that its streams differ."""
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.phi.copy_(torch.randn(connection.phi.shape, generator=generator))
            connection.bias.add_(torch.randn(connection.bias.shape, generator=generator) / connection.gate_speed)
            connection.scale.fill_(1.0 / connection.scale_speed)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers, by name, as leaves in float64."""
    return {
        name: value.detach().to(torch.float64, copy=True).requires_grad_(value.requires_grad)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


#: The default gate_speed and scale_speed of a function-preserving start: factors of bias and scale.
SPEED, SLOW = 32, 1 / 128


def site_by_hand(X: Tensor, parameters: list[Tensor], f, n: int, iterations: int, eps: float) -> Tensor:
    """arXiv 2512.24880 v2: v = vec(X); z = (v phi) / rms(v); pre, post sigmoids; Sinkhorn (columns,
    rows); X' = H_res X + H_postᵀ f(H_pre X).
    """
    phi, bias, scale = parameters[0], faster(parameters[1], SPEED), SLOW * parameters[2]
    v = X.reshape(*X.shape[:-2], -1)
    z = (v @ phi) / torch.sqrt((v * v).mean(-1, keepdim=True) + eps)
    pre = 1 / (1 + torch.exp(-(scale[0] * z[..., :n] + bias[:n])))
    post = 2 / (1 + torch.exp(-(scale[1] * z[..., n : 2 * n] + bias[n : 2 * n])))
    M = torch.exp(scale[2] * z[..., 2 * n :] + bias[2 * n :]).reshape(*z.shape[:-1], n, n)
    for _ in range(iterations):
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    h = torch.einsum("...n,...nc->...c", pre, X)
    return torch.einsum("...ij,...jc->...ic", M, X) + torch.einsum("...i,...c->...ic", post, f(h))


def transformer_by_hand(values: dict[str, Tensor], tokens: Tensor, gain: float, *, plain: bool = False) -> Tensor:
    """`Transformer` on streams, from its values by name; with `plain`, without hyper-connections.

    A residual add without parameters of its own is added to every stream.
    """

    def linear(path: str, x: Tensor) -> Tensor:
        weight = values.get(f"{path}.weight")
        if weight is None:
            weight = values[f"{path}.quantised"] * values[f"{path}.row_scale"]
        return x @ weight.t() + values[f"{path}.bias"]

    def norm(path: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        return normal * values[f"{path}.weight"] + values[f"{path}.bias"]

    def attn(path: str, x: Tensor) -> Tensor:
        scores = torch.exp(linear(f"{path}.q", x) @ x.transpose(-1, -2))
        return linear(f"{path}.out", (scores / scores.sum(-1, keepdim=True)) @ x)

    def mlp(path: str, x: Tensor) -> Tensor:
        return linear(f"{path}.down", torch.tanh(linear(f"{path}.up", x)))

    X = torch.stack([values["embed.weight"][tokens]] * STREAMS, dim=-2)
    for number in range(sum(name.endswith("norm1.weight") for name in values)):
        block = f"blocks.{number}"
        for place, (name, function) in enumerate({"attn": attn, "mlp": mlp}.items(), 1):
            site = f"{block}.mhc.{name}"

            def branch(h: Tensor, path=f"{block}.{name}", norm_path=f"{block}.norm{place}", function=function):
                return function(path, norm(norm_path, h))

            if plain or f"{site}.phi" not in values:
                X = X + branch(X.mean(-2)).unsqueeze(-2)
            else:
                parameters = [values[f"{site}.{part}"] for part in ("phi", "bias", "scale")]
                X = site_by_hand(X, parameters, branch, STREAMS, ITERATIONS, EPS)
    return linear("head", X.mean(-2)) * gain
