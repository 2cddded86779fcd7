"""The transformer layers that torch ships.

In eval mode without gradients the encoder runs a fused path without adds; the zoo traces with
gradients.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Block, Each, Norm, network
from mhc_compile.tools.zoo.family import Case, Family, per_layer

__all__ = ["FAMILIES"]


def _encoder(layers: int, *, norm_first: bool = False, masked: bool = False) -> Case:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, norm_first=norm_first, batch_first=True)
    stack = nn.TransformerEncoder(layer, layers, Norm(), enable_nested_tensor=False)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    return stack, (torch.randn(2, 5, WIDTH),), {"src_key_padding_mask": hidden} if masked else {}


def _decoder(layers: int, *, norm_first: bool = False) -> Case:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 24, norm_first=norm_first, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))
    return nn.TransformerDecoder(layer, layers), inputs, {"tgt_mask": mask, "tgt_is_causal": True}


def _both(layers: int) -> nn.Module:
    return nn.Transformer(WIDTH, 2, layers, layers, 24, batch_first=True)


class AttentionStack(Block, norms=Each(Norm), attns=Each(partial(nn.MultiheadAttention, WIDTH, 2))):
    """`x + nn.MultiheadAttention(norm(x))`, with tokens first: [T, B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        for norm, attn in zip(self.norms, self.attns, strict=True):
            h = norm(x)
            x = x + attn(h, h, h, need_weights=False)[0]
        return x


_TWO, _THREE = per_layer(2), per_layer(3)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "torch_layers": (
        Family("torch-encoder", _encoder, _TWO),
        Family("torch-encoder-pre", partial(_encoder, norm_first=True), _TWO),
        Family("torch-encoder-masked", partial(_encoder, masked=True), _TWO),
        Family("torch-decoder", _decoder, _THREE),
        Family("torch-decoder-pre", partial(_decoder, norm_first=True), _THREE),
        Family("torch-transformer", network(_both, (2, 5, WIDTH), (2, 4, WIDTH)), per_layer(2, 3)),
        Family("torch-attention", network(AttentionStack, (5, 2, WIDTH)), per_layer(1)),
    ),
}
