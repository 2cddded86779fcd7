"""Transformer blocks by where they put norms, scales and gates. One residual formula each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Attention, FeedForward, tokens, vectors
from mhc_compile.tools.zoo.family import Family, chains

__all__ = ["FAMILIES"]


class PreNorm(nn.Module):
    """`x + attention(norm(x))`, `x + mlp(norm(x))`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(causal=True), FeedForward()
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm(x)))
        return x + self.drop(self.mlp(x))


class PostNorm(nn.Module):
    """`norm(x + f(x))`: the trunk itself is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward(norm=False)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(nn.Module):
    """`x + attention(norm(x)) + mlp(norm(x))`: one site of two adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), FeedForward(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attn(h) + self.mlp(h)


class ParallelSum(Parallel):
    """`dropout(attention + mlp) + x`, the branches summed first and the skip last."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return F.dropout(self.attn(h) + self.mlp(h), 0.1, self.training) + x


class Sandwich(nn.Module):
    """`x + norm(f(norm(x)))`: the branch ends in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward(norm=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attn(self.norms[0](x)))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class NormFormer(nn.Module):
    """Extra norms behind attention and inside the MLP, and scales per head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn, self.up, self.down = Attention(), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.inner, self.head_scale = nn.LayerNorm(2 * WIDTH), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn(self.norm1(x)).unflatten(-1, (2, -1)) * self.head_scale[:, None]
        x = x + self.norm2(heads.flatten(-2))
        return x + self.down(self.inner(F.gelu(self.up(self.norm3(x)))))


class DeepNorm(nn.Module):
    """`norm(alpha * x + f(x))`: the skip is scaled by a number."""

    def __init__(self, alpha: float = 1.3) -> None:
        super().__init__()
        self.alpha, self.attn, self.mlp = alpha, Attention(), FeedForward(norm=False)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.alpha * x + self.attn(x))
        return self.norm2(x * self.alpha + self.mlp(x))


class ScaledSkip(nn.Module):
    """`w * x + f(x)` with a learned vector w: the skip is scaled by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.w = FeedForward(), nn.Parameter(torch.linspace(0.5, 1.0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x + self.mlp(x)


class Interpolated(nn.Module):
    """`0.9 x + 0.1 f(x)`: both sides are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * x + 0.1 * self.mlp(x)


class ReZero(nn.Module):
    """`x + a f(x)` with a learned number a."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.a = FeedForward(norm=False), nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a * self.mlp(x)


class LayerScale(nn.Module):
    """`x + g ⊙ f(norm(x))` with a learned vector g."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), FeedForward()
        self.g1, self.g2 = (nn.Parameter(torch.full((WIDTH,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.g1 * self.attn(self.norm(x))
        return x + self.g2 * self.mlp(x)


class Rescaled(nn.Module):
    """`(x + f(x)) / √2`: the sum is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mlp(x)) * 0.5**0.5


class StochasticDepth(nn.Module):
    """In training whole samples lose the branch: `x + mask f(x) / keep`, with a random mask [B, 1, 1]."""

    def __init__(self, keep: float = 0.8) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp, self.keep = nn.LayerNorm(WIDTH), Attention(), FeedForward(), keep

    def _drop(self, y: Tensor) -> Tensor:
        if not self.training:
            return y
        return y.div(self.keep) * torch.rand(len(y), 1, 1).add(self.keep).floor()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm(x)))
        return x + self._drop(self.mlp(x))


class DroppedTrunk(nn.Module):
    """`dropout(x + f(x))`: in training the trunk itself loses entries."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.drop = FeedForward(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x + self.mlp(x))


class Orthogonal(nn.Module):
    """`x + (f(x) - its part along x)`: the branch reads the trunk a second time, at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        along = (y * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True).clamp_min(1e-6)
        return x + (y - along * x)


_ONE, _TWO = chains(lambda n: (n,)), chains(lambda n: (2 * n,))
_GROUP = "transformer_blocks"
FAMILIES: tuple[Family, ...] = (
    Family("pre-norm", _GROUP, tokens(PreNorm), _TWO),
    Family("pre-norm-dropout", _GROUP, tokens(lambda: PreNorm(0.2)), _TWO),
    Family("post-norm", _GROUP, tokens(PostNorm), _TWO),
    Family("parallel", _GROUP, tokens(Parallel), _ONE),
    Family("parallel-sum", _GROUP, tokens(ParallelSum), _ONE),
    Family("sandwich", _GROUP, tokens(Sandwich), _TWO),
    Family("normformer", _GROUP, tokens(NormFormer), _TWO),
    Family("deepnorm", _GROUP, tokens(DeepNorm), _TWO),
    Family("scaled-skip", _GROUP, vectors(ScaledSkip), _ONE),
    Family("interpolated", _GROUP, vectors(Interpolated), _ONE),
    Family("rezero", _GROUP, vectors(ReZero), _ONE),
    Family("layer-scale", _GROUP, vectors(LayerScale), _TWO),
    Family("rescaled-sum", _GROUP, vectors(Rescaled), _ONE),
    Family("stochastic-depth", _GROUP, vectors(StochasticDepth), _TWO),
    Family("orthogonal-update", _GROUP, vectors(Orthogonal), _ONE),
    Family("dropped-trunk", _GROUP, vectors(DroppedTrunk), _ONE),
)
