"""Blocks that read more than the trunk: conditioning, a memory, class tokens, windows; and mixers that have no attention at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Attention, FeedForward, Framed, vectors
from mhc_compile.tools.zoo.family import Case, Family, chains

__all__ = ["FAMILIES"]


class AdaptiveBlock(nn.Module):
    """DiT: `x + gate(c) f(norm(x) (1 + scale(c)) + shift(c))`, all three from one conditioning vector [B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), FeedForward(norm=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


def _dit(layers: int) -> Case:
    return Framed([AdaptiveBlock() for _ in range(layers)]), (torch.randn(2, 5, 8), torch.randn(2, WIDTH)), {}


class CrossBlock(nn.Module):
    """A decoder block: self-attention, attention to a memory, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.cross, self.mlp = Attention(causal=True), Attention(), FeedForward()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(x)


def _cross(layers: int) -> Case:
    return Framed([CrossBlock() for _ in range(layers)]), (torch.randn(2, 5, 8), torch.randn(2, 7, WIDTH)), {}


class Perceiver(nn.Module):
    """Latents that are parameters read the input by cross attention: the first skip is a parameter, the later ones are computed."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.latents, self.into = nn.Parameter(torch.randn(1, 4, WIDTH)), nn.Linear(8, WIDTH)
        self.cross = nn.ModuleList(Attention() for _ in range(layers))
        self.mlps = nn.ModuleList(FeedForward() for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.into(x)
        latents = self.latents.expand(len(x), -1, -1)
        for cross, mlp in zip(self.cross, self.mlps, strict=True):
            latents = latents + cross(self.norm(latents), memory)
            latents = latents + mlp(latents)
        return self.out(latents)


class ClassAttention(nn.Module):
    """CaiT: patches run through layers of their own; then a class token reads them twice, itself a residual stream."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.attns, self.mlps = (nn.ModuleList(kind() for _ in range(layers)) for kind in (Attention, FeedForward))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.readers, self.heads = (nn.ModuleList(kind() for _ in range(2)) for kind in (Attention, FeedForward))
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for attn, mlp in zip(self.attns, self.mlps, strict=True):
            x = x + self.scale * attn(self.norm(x))
            x = x + self.scale * mlp(x)
        token = self.token.expand(len(x), -1, -1)
        for reader, head in zip(self.readers, self.heads, strict=True):
            token = token + self.scale * reader(self.norm(token), torch.cat([token, x], dim=1))
            token = token + self.scale * head(token)
        return self.out(token[:, 0])


class MixerBlock(nn.Module):
    """MLP-Mixer: the first branch mixes tokens through a transpose, the second features."""

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(WIDTH), FeedForward(tokens, norm=False), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


class SpatialGate(nn.Module):
    """gMLP: `x + down(u ⊙ mix(v))`, u and v the halves of one projection."""

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inner, self.mix = nn.LayerNorm(2 * WIDTH), nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.mix(self.inner(v)))


class WindowBlock(nn.Module):
    """Swin: tokens are rolled and cut into windows inside the branch; the skip stays [B, H·W, C]."""

    def __init__(self, shift: int, side: int = 4, window: int = 2) -> None:
        super().__init__()
        self.shift, self.side, self.window = shift, side, window
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        batch, side, w = len(x), self.side, self.window
        grid = torch.roll(self.norm(x).view(batch, side, side, WIDTH), (-self.shift, -self.shift), (1, 2))
        cut = grid.view(batch, side // w, w, side // w, w, WIDTH).transpose(2, 3).reshape(-1, w * w, WIDTH)
        back = self.attn(cut).view(batch, side // w, side // w, w, w, WIDTH).transpose(2, 3)
        grid = torch.roll(back.reshape(batch, side, side, WIDTH), (self.shift, self.shift), (1, 2))
        x = x + grid.view(batch, side * side, WIDTH)
        return x + self.mlp(x)


def _windows(layers: int) -> Case:
    return Framed([WindowBlock(layer % 2) for layer in range(layers)]), (torch.randn(2, 16, 8),), {}


class GlobalContext(nn.Module):
    """`x + f(mean of x)`: the branch is [B, 1, C] and every token receives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x.mean(1, keepdim=True))


_ONE, _TWO = chains(lambda n: (n,)), chains(lambda n: (2 * n,))
_GROUP = "attention_variants"
FAMILIES: tuple[Family, ...] = (
    Family("dit", _GROUP, _dit, _TWO),
    Family("cross-attention", _GROUP, _cross, chains(lambda n: (3 * n,))),
    Family("perceiver", _GROUP, lambda n: (Perceiver(n), (torch.randn(2, 5, 8),), {}), chains(lambda n: (2 * n,))),
    Family("cait", _GROUP, lambda n: (ClassAttention(n), (torch.randn(2, 5, 8),), {}), chains(lambda n: (2 * n, 4))),
    Family("mlp-mixer", _GROUP, vectors(MixerBlock), _TWO),
    Family("gmlp", _GROUP, vectors(SpatialGate), _ONE),
    Family("swin-windows", _GROUP, _windows, _TWO),
    Family("global-context", _GROUP, vectors(GlobalContext), _ONE),
)
