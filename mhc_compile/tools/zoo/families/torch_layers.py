"""The transformer layers of torch. Traced with gradients: without, an encoder runs a fused path."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Each, Norm, network, wired
from mhc_compile.tools.zoo.family import Case, Family, per_layer


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


def _attention_stack(net: Any, x: Tensor) -> Tensor:
    """`x + nn.MultiheadAttention(norm(x))`, with tokens first: [T, B, C]."""
    for norm, attn in zip(net.norms, net.attns, strict=True):
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
        wired("torch-attention", _attention_stack, (5, 2, WIDTH), norms=Each(Norm),
              attns=Each(partial(nn.MultiheadAttention, WIDTH, 2))),
    ),
}  # fmt: skip
