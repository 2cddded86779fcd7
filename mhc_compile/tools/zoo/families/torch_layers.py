"""The transformer layers that torch ships. In eval mode without gradients the encoder runs a fused path without adds; the zoo traces with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH
from mhc_compile.tools.zoo.family import Case, Family, chains

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAMILIES"]


def _encoder(*, norm_first: bool, masked: bool = False) -> Callable[[int], Case]:
    def make(layers: int) -> Case:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, norm_first=norm_first, batch_first=True)
        network = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        hidden = torch.zeros(2, 5, dtype=torch.bool)
        hidden[1, 3:] = True
        return network, (torch.randn(2, 5, WIDTH),), {"src_key_padding_mask": hidden} if masked else {}

    return make


def _decoder(*, norm_first: bool) -> Callable[[int], Case]:
    def make(layers: int) -> Case:
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 24, norm_first=norm_first, batch_first=True)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))
        return nn.TransformerDecoder(layer, layers), inputs, {"tgt_mask": mask, "tgt_is_causal": True}

    return make


def _both(layers: int) -> Case:
    network = nn.Transformer(WIDTH, 2, layers, layers, 24, batch_first=True)
    return network, (torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)), {}


class AttentionStack(nn.Module):
    """`x + nn.MultiheadAttention(norm(x))`, with tokens first: [T, B, C]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.attns = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, attn in zip(self.norms, self.attns, strict=True):
            h = norm(x)
            x = x + attn(h, h, h, need_weights=False)[0]
        return x


_TWO, _THREE = chains(lambda n: (2 * n,)), chains(lambda n: (3 * n,))
_GROUP = "torch_layers"
FAMILIES: tuple[Family, ...] = (
    Family("torch-encoder", _GROUP, _encoder(norm_first=False), _TWO),
    Family("torch-encoder-pre", _GROUP, _encoder(norm_first=True), _TWO),
    Family("torch-encoder-masked", _GROUP, _encoder(norm_first=False, masked=True), _TWO),
    Family("torch-decoder", _GROUP, _decoder(norm_first=False), _THREE),
    Family("torch-decoder-pre", _GROUP, _decoder(norm_first=True), _THREE),
    Family("torch-transformer", _GROUP, _both, chains(lambda n: (2 * n, 3 * n))),
    Family(
        "torch-attention",
        _GROUP,
        lambda n: (AttentionStack(n), (torch.randn(5, 2, WIDTH),), {}),
        chains(lambda n: (n,)),
    ),
)
