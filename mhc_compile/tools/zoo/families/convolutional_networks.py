"""Convolutional classifiers in stages, and networks whose output is an image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    WIDTH, Attention, Block, Each, Stack, TransformerBlock, conv2d, linear, network, wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Family, chains, per_layer


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the size at stride 1, batch norm, activation."""

    def __init__(
        self, into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
    ) -> None:
        conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), act())


class Basic(nn.Module):
    """ResNet: `relu(shortcut(x) + f(x))`, the shortcut a convolution where the shape changes."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.f = nn.Sequential(ConvNormAct(into, out, 3, stride), ConvNormAct(out, out, act=nn.Identity))
        self.shortcut = nn.Identity() if into == out else ConvNormAct(into, out, 1, stride, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.f(x))


class Bottleneck(Basic):
    """ResNeXt, RegNet: a grouped bottleneck; the add and the ReLU are in place on the branch."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__(into, out, stride)
        narrow = out // 2
        self.f = nn.Sequential(
            ConvNormAct(into, narrow, 1),
            ConvNormAct(narrow, narrow, 3, stride, 2),
            ConvNormAct(narrow, out, 1, act=nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += self.shortcut(x)
        return F.relu_(y)


class PreActivation(nn.Module):
    """ResNet v2: `skip + f(relu(norm(x)))`. A convolutional skip reads the activated value."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(into), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None if into == out else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(h))))


class Padded(Basic):
    """The shortcut without parameters: every second pixel, and zeros for the new channels."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__(into, out, stride)
        self.shortcut = nn.Identity()
        self.stride, self.more = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        skip = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            skip = F.pad(skip, (0, 0, 0, 0, 0, self.more))
        return F.relu(skip + self.f(x))


class Inverted(nn.Module):
    """MobileNetV2: wide depthwise middle, linear end, a skip only where the shape stays."""

    def __init__(self, into: int, out: int, stride: int = 1, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        wide = 2 * into
        self.f = nn.Sequential(
            ConvNormAct(into, wide, 1, act=act),
            ConvNormAct(wide, wide, 3, stride, wide, act=act),
            ConvNormAct(wide, out, 1, act=nn.Identity),
        )
        self.residual = into == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.residual else self.f(x)


class SqueezeExcite(nn.Module):
    """`x ⊙ sigmoid(mlp(mean over pixels))`: a gate, no add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class EfficientBlock(Inverted):
    """MBConv: the inverted bottleneck with squeeze-and-excite, SiLU and stochastic depth."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__(into, out, stride, nn.SiLU)
        self.f.insert(2, SqueezeExcite(2 * into))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.residual and self.training:
            y = y * torch.empty(len(y), 1, 1, 1).bernoulli_(0.8).div_(0.8)
        return x + y if self.residual else y


class ConvNeXt(nn.Module):
    """Depthwise 7 × 7, then norm and MLP on [B, H, W, C]; the skip never leaves [B, C, H, W]."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.change = None if into == out else nn.Conv2d(into, out, stride, stride)
        self.spatial, self.norm = nn.Conv2d(out, out, 7, padding=3, groups=out), nn.LayerNorm(out)
        self.up, self.down = nn.Linear(out, 2 * out), nn.Linear(2 * out, out)
        self.scale = nn.Parameter(torch.full((out,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.change is None else self.change(x)
        h = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


class Staged(nn.Module):
    """A stem, two stages of `layers` blocks of widths 8 and 16, the second at half size, a head."""

    def __init__(self, block: type[nn.Module], layers: int) -> None:
        super().__init__()
        first = [block(8, 8) for _ in range(layers)]
        second = [block(8 if layer == 0 else 16, 16, 2 if layer == 0 else 1) for layer in range(layers)]
        self.stem, self.stages, self.head = ConvNormAct(3, 8), nn.Sequential(*first, *second), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def _staged(name: str, block: type[nn.Module], *, because: str = "") -> Family:
    """Return a family whose second stage has a chain that is shorter by its first block."""
    expected = chains(lambda n: (n, n - 1))
    return Family(name, network(partial(Staged, block), _IMAGES), expected, double=bool(because), because=because)


# Networks whose output is an image: U-Nets, super-resolution, dense connections
class ResidualConv(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` on group norms: the block of diffusion U-Nets."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


_NARROW = Stack(partial(ResidualConv, 8))


def _unet(net: Any, x: Tensor) -> Tensor:
    """Residual blocks at two resolutions; the decoder concatenates the encoder's result."""
    high = net.encoder(net.stem(x))
    low = net.middle(net.down(high))
    return net.head(net.decoder(net.merge(torch.cat([net.up(low), high], dim=1))))


class DenseBlock(nn.Module):
    """`x + 0.2 f(x)`, where each convolution of f reads the concatenation of all earlier values."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 + i * 4, 4 if i < 2 else 8, 3, 1, 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, dim=1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(seen, dim=1))


class NestedDense(Block, blocks=lambda: Stack(DenseBlock)(3)):
    """RRDB: `x + 0.2 f(x)`, where f is three dense blocks in a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.blocks(x)


def _super_resolution(net: Any, x: Tensor) -> Tensor:
    """Nested blocks, a convolution, a skip over all of them, then a higher resolution."""
    x = net.stem(x)
    return F.pixel_shuffle(net.head(x + net.trunk(net.blocks(x))), 2)


class DenseNet(nn.Module):
    """Concatenation only: there is nothing to add."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * layer, 4, 3, 1, 1) for layer in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.cat([x, F.relu(conv(x))], dim=1)
        return x


def _long_skips(net: Any, x: Tensor) -> Tensor:
    """U-ViT: a linear layer merges the trunk of the first half into each block of the second."""
    x = net.into(x).flatten(2).transpose(1, 2)
    kept = []
    for block in net.first:
        x = block(x)
        kept.append(x)
    for block, merge in zip(net.second, net.merge, strict=True):
        x = block(merge(torch.cat([x, kept.pop()], dim=-1)))
    return net.out(x)


def _spatial_attention(net: Any, x: Tensor) -> Tensor:
    """VAE, in its middle: a convolutional residual and attention over the pixels in turn."""
    x = net.stem(x)
    for conv, attn in zip(net.convs, net.attns, strict=True):
        x = conv(x)
        pixels = attn(net.norm(x).flatten(2).transpose(1, 2))
        x = x + pixels.transpose(1, 2).reshape(x.shape)
    return net.head(x)


def _both_layouts(net: Any, x: Tensor) -> Tensor:
    """CoAtNet, MaxViT: a convolutional residual on [B, C, H, W], then attention on [B, H·W, C]."""
    x = net.stem(x)
    for conv, block in zip(net.convs, net.blocks, strict=True):
        x = conv(x)
        x = block(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
    return net.head(x)


_IMAGES = (2, 3, 8, 8)
_BOTTLENECK = "a batch norm after a linear bottleneck: means that are zero in exact arithmetic"
FAMILIES: dict[str, tuple[Family, ...]] = {
    "convolutional_blocks": (
        _staged("resnet", Basic),
        _staged("regnet", Bottleneck),
        _staged("preact-resnet", PreActivation),
        _staged("padded-resnet", Padded),
        _staged("mobilenet", Inverted, because=_BOTTLENECK),
        _staged("efficientnet", EfficientBlock, because=_BOTTLENECK),
        Family("convnext-stages", network(partial(Staged, ConvNeXt), _IMAGES), per_layer(1, 1)),
    ),
    "dense_prediction": (
        wired("residual-unet", _unet, _IMAGES, expected=per_layer(1, 1, 1), stem=conv2d(3, 8, 3, 1, 1),
              down=conv2d(8, 8, 2, 2), up=partial(nn.ConvTranspose2d, 8, 8, 2, 2), encoder=_NARROW, middle=_NARROW,
              decoder=_NARROW, merge=conv2d(16, 8, 1), head=conv2d(8, 3, 1)),
        wired("rrdb", _super_resolution, _IMAGES, expected=chains(lambda n: (3 * n, 1)), stem=conv2d(3, 8, 3, 1, 1),
              trunk=conv2d(8, 8, 3, 1, 1), head=conv2d(8, 12, 3, 1, 1), blocks=Stack(NestedDense)),
        Family("densenet", network(DenseNet, _IMAGES), per_layer()),
        wired("uvit", _long_skips, _IMAGES, expected=chains(lambda n: (2 * n, *(2,) * n)),
              into=conv2d(3, WIDTH, 2, 2), first=Each(TransformerBlock), second=Each(TransformerBlock),
              merge=Each(linear(2 * WIDTH, WIDTH)), out=linear(WIDTH, 12)),
        wired("both-layouts", _both_layouts, _IMAGES, expected=per_layer(3), stem=conv2d(3, WIDTH, 2, 2),
              head=conv2d(WIDTH, 3, 1), convs=Each(ResidualConv), blocks=Each(TransformerBlock)),
        wired("vae-middle", _spatial_attention, (2, 3, 4, 4), expected=per_layer(2), stem=conv2d(3, WIDTH, 3, 1, 1),
              norm=partial(nn.GroupNorm, 2, WIDTH), head=conv2d(WIDTH, 3, 1), convs=Each(ResidualConv),
              attns=Each(Attention)),
    ),
}  # fmt: skip
