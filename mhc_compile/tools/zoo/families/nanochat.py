"""nanochat's model, whose trunk has sums that are no residual adds: before, between and after."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import OUT, VOCABULARY, WIDTH, Block, Each, Plain, linear

#: Gates read this many features.
GATE = 4
_matrix, _gate = linear(WIDTH, WIDTH, bias=False), linear(GATE, 1, bias=False)
_table = partial(nn.Embedding, VOCABULARY, WIDTH)
_norm = partial(F.rms_norm, normalized_shape=(WIDTH,))


class ValueAttention(Block, q=_matrix, k=_matrix, v=_matrix, gate=_gate, out=_matrix):
    """Causal attention whose values take a gated share of `extra`. `x, extra: [B, T, C]`."""

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        v = self.v(x) + 2 * torch.sigmoid(self.gate(x[..., :GATE])) * extra
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), v, is_causal=True))


class Nanochat(
    Block, embed=_table, gate=_gate, attn=Each(ValueAttention), mlps=Each(Plain), values=Each(_table), head=OUT
):  # fmt: skip
    """Token ids [B, T] to [B, T, 4].

    Every token takes a gated share of the token before (`smear`), every layer starts from a mix
    with the first embedding, and the middle of the model is subtracted at the end. With `before`,
    [B, 1, C], a single token is decoded.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.kept, self.first = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.1))
        self.smear, self.back = nn.Parameter(torch.full((1,), 0.5)), nn.Parameter(torch.full((1,), 0.2))

    def forward(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        x = _norm(self.embed(ids))
        gate = self.smear * torch.sigmoid(self.gate(x[:, int(before is None) :, :GATE]))
        x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1) if before is None else x + gate * before
        first = middle = x
        for layer, (attention, mlp, table) in enumerate(zip(self.attn, self.mlps, self.values, strict=True)):
            x = self.kept[layer] * x + self.first[layer] * first
            x = x + attention(_norm(x), table(ids))
            x = x + mlp(_norm(x))
            middle = x if layer == len(self.mlps) // 2 else middle
        return self.head(_norm(x - self.back * middle))
