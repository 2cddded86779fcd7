"""Transformer blocks by where they put norms, scales and gates, and by what they read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, Attention, Block, Each, FeedForward, Framed, Norm, Plain, TransformerBlock, linear,
    network, parameter, tokens, spelled, vectors, wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Family, chains, per_layer


class PreNorm(Block, norm=Norm, attn=partial(Attention, causal=True), mlp=FeedForward):
    """`x + dropout(attention(norm(x)))`, `x + dropout(mlp(norm(x)))`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm(x)))
        return x + self.drop(self.mlp(x))


class PostNorm(Block, attn=Attention, mlp=Plain, norm1=Norm, norm2=Norm):
    """`norm(x + f(x))`: the trunk itself is normalised."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(Block, norm=Norm, attn=Attention, mlp=Plain):
    """`x + attention(norm(x)) + mlp(norm(x))`: one site of two adds."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attn(h) + self.mlp(h)


class ParallelSum(Parallel):
    """`dropout(attention + mlp) + x`, the branches summed first and the skip last."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return F.dropout(self.attn(h) + self.mlp(h), 0.1, self.training) + x


class Sandwich(Block, attn=Attention, mlp=Plain, norms=lambda: nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))):
    """`x + norm(f(norm(x)))`: the branch ends in a norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attn(self.norms[0](x)))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class NormFormer(
    Block, norm1=Norm, norm2=Norm, norm3=Norm, attn=Attention, up=linear(WIDTH, 2 * WIDTH), down=linear(2 * WIDTH, WIDTH),
    inner=partial(nn.LayerNorm, 2 * WIDTH), head_scale=parameter(1.0, 2),
):  # fmt: skip
    """Extra norms after attention and inside the MLP, and scales per head."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn(self.norm1(x)).unflatten(-1, (2, -1)) * self.head_scale[:, None]
        x = x + self.norm2(heads.flatten(-2))
        return x + self.down(self.inner(F.gelu(self.up(self.norm3(x)))))


class DeepNorm(PostNorm):
    """`norm(1.3 x + f(x))`: the skip is scaled by a number."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(1.3 * x + self.attn(x))
        return self.norm2(x * 1.3 + self.mlp(x))


class LayerScale(TransformerBlock, g1=parameter(0.1), g2=parameter(0.1)):
    """`x + g ⊙ f(norm(x))` with a learned vector g."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.g1 * self.attn(self.norm(x))
        return x + self.g2 * self.mlp(x)


class StochasticDepth(TransformerBlock):
    """`x + mask f(x) / keep`, with a random mask [B, 1, 1]: in training samples lose the branch."""

    def _drop(self, y: Tensor, keep: float = 0.8) -> Tensor:
        return y.div(keep) * torch.rand(len(y), 1, 1).add(keep).floor() if self.training else y

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm(x)))
        return x + self._drop(self.mlp(x))


def _orthogonal(block: Any, x: Tensor) -> Tensor:
    """`x + (f(x) - its part along x)`: the branch reads the trunk a second time, at its end."""
    y = block.mlp(x)
    along = (y * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp_min(1e-6)
    return x + (y - along * x)


# Blocks that read more than the trunk, and mixers without attention
def _adaptive_block(block: Any, x: Tensor, c: Tensor) -> Tensor:
    """DiT: `x + gate(c) f(norm(x) (1 + scale(c)) + shift(c))`, conditioned on a vector c [B, C]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=-1)
    x = x + gate1 * block.attn(block.norm(x) * (1 + scale1) + shift1)
    return x + gate2 * block.mlp(block.norm(x) * (1 + scale2) + shift2)


def _cross_block(block: Any, x: Tensor, memory: Tensor) -> Tensor:
    """`x + attention(norm(x))`, then attention to a memory, then an MLP: a decoder block."""
    x = x + block.attn(block.norm1(x))
    x = x + block.cross(block.norm2(x), memory)
    return x + block.mlp(x)


def _perceiver(net: Any, x: Tensor) -> Tensor:
    """Latents read the input by cross attention; the first skip is a parameter."""
    memory = net.into(x)
    latents = net.latents.expand(len(x), -1, -1)
    for cross, mlp in zip(net.cross, net.mlps, strict=True):
        latents = latents + cross(net.norm(latents), memory)
        latents = latents + mlp(latents)
    return net.out(latents)


def _class_attention(net: Any, x: Tensor) -> Tensor:
    """CaiT: a trunk of patches; then a class token, a residual stream too, reads them twice."""
    x = net.into(x)
    for attn, mlp in zip(net.attns, net.mlps, strict=True):
        x = x + net.scale * attn(net.norm(x))
        x = x + net.scale * mlp(x)
    token = net.token.expand(len(x), -1, -1)
    for reader, head in zip(net.readers, net.heads, strict=True):
        token = token + net.scale * reader(net.norm(token), torch.cat([token, x], dim=1))
        token = token + net.scale * head(token)
    return net.out(token[:, 0])


def _mixer_block(block: Any, x: Tensor) -> Tensor:
    """MLP-Mixer: the first branch mixes tokens through a transpose, the second features."""
    x = x + block.mix(block.norm(x).transpose(1, 2)).transpose(1, 2)
    return x + block.mlp(x)


def _spatial_gate(block: Any, x: Tensor) -> Tensor:
    """gMLP: `x + down(u ⊙ mix(v))`, u and v the halves of one projection."""
    u, v = F.gelu(block.up(block.norm(x))).chunk(2, dim=-1)
    return x + block.down(u * block.mix(block.inner(v)))


class WindowBlock(TransformerBlock):
    """Swin: the branch rolls tokens and cuts them into windows; the skip stays [B, H·W, C]."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        batch, side, w = len(x), 4, 2
        grid = torch.roll(self.norm(x).view(batch, side, side, WIDTH), (-self.shift, -self.shift), (1, 2))
        cut = grid.view(batch, side // w, w, side // w, w, WIDTH).transpose(2, 3).reshape(-1, w * w, WIDTH)
        back = self.attn(cut).view(batch, side // w, side // w, w, w, WIDTH).transpose(2, 3)
        grid = torch.roll(back.reshape(batch, side, side, WIDTH), (self.shift, self.shift), (1, 2))
        x = x + grid.view(batch, side * side, WIDTH)
        return x + self.mlp(x)


def _windows(layers: int) -> nn.Module:
    return Framed([WindowBlock(layer % 2) for layer in range(layers)])


_ONE, _TWO = per_layer(1), per_layer(2)
_mlp = partial(spelled, mlp=FeedForward)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "transformer_blocks": (
        Family("pre-norm", tokens(PreNorm), _TWO),
        Family("pre-norm-dropout", tokens(lambda: PreNorm(0.2)), _TWO),
        Family("post-norm", tokens(PostNorm), _TWO),
        Family("parallel", tokens(Parallel), _ONE),
        Family("parallel-sum", tokens(ParallelSum), _ONE),
        Family("sandwich", tokens(Sandwich), _TWO),
        Family("normformer", tokens(NormFormer), _TWO),
        Family("deepnorm", tokens(DeepNorm), _TWO),
        _mlp("scaled-skip", lambda block, x: block.w * x + block.mlp(x),
             doc="`w * x + f(x)` with a learned vector w: the skip is scaled by a parameter.",
             w=lambda: nn.Parameter(torch.linspace(0.5, 1.0, WIDTH))),
        _mlp("interpolated", lambda block, x: 0.9 * x + 0.1 * block.mlp(x),
             doc="`0.9 x + 0.1 f(x)`: both sides are scaled."),
        spelled("rezero", lambda block, x: x + block.a * block.mlp(x), doc="`x + a f(x)` with a learned number a.",
                mlp=Plain, a=parameter(0.1, 1)),
        Family("layer-scale", vectors(LayerScale), _TWO),
        _mlp("rescaled-sum", lambda block, x: (x + block.mlp(x)) * 0.5**0.5,
             doc="`(x + f(x)) / √2`: the sum is scaled."),
        Family("stochastic-depth", vectors(StochasticDepth), _TWO),
        spelled("orthogonal-update", _orthogonal, mlp=FeedForward),
        _mlp("dropped-trunk", lambda block, x: block.drop(x + block.mlp(x)),
             doc="`dropout(x + f(x))`: in training the trunk itself loses entries.", drop=partial(nn.Dropout, 0.1)),
    ),
    "attention_variants": (
        spelled("dit", _adaptive_block, (2, WIDTH), expected=_TWO,
                norm=partial(nn.LayerNorm, WIDTH, elementwise_affine=False), attn=Attention, mlp=Plain,
                modulation=lambda: nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))),
        spelled("cross-attention", _cross_block, (2, 7, WIDTH), expected=per_layer(3), norm1=Norm, norm2=Norm,
                attn=partial(Attention, causal=True), cross=Attention, mlp=FeedForward),
        wired("perceiver", _perceiver, expected=_TWO, latents=lambda: nn.Parameter(torch.randn(1, 4, WIDTH)),
              into=INTO, cross=Each(Attention), mlps=Each(FeedForward), norm=Norm, out=OUT),
        wired("cait", _class_attention, expected=chains(lambda n: (2 * n, 4)), into=INTO, out=OUT,
              attns=Each(Attention), mlps=Each(FeedForward), token=lambda: nn.Parameter(torch.randn(1, 1, WIDTH)),
              readers=Each(Attention, lambda _: 2), heads=Each(FeedForward, lambda _: 2), norm=Norm,
              scale=parameter(0.1)),
        spelled("mlp-mixer", _mixer_block, expected=_TWO, norm=Norm, mix=partial(FeedForward, 5, norm=False),
                mlp=FeedForward),
        spelled("gmlp", _spatial_gate, norm=Norm, up=linear(WIDTH, 4 * WIDTH), down=linear(2 * WIDTH, WIDTH),
                inner=partial(nn.LayerNorm, 2 * WIDTH), mix=partial(nn.Conv1d, 5, 5, 1)),
        Family("swin-windows", network(_windows, (2, 16, 8)), _TWO),
        _mlp("global-context", lambda block, x: x + block.mlp(x.mean(1, keepdim=True)),
             doc="`x + f(mean of x)`: the branch is [B, 1, C] and every token receives the same."),
    ),
}  # fmt: skip
