"""Convolutional classifiers: the trunk is [B, C, H, W], and stages end in a change of width or resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import feature_maps
from mhc_compile.tools.zoo.family import Family, chains

__all__ = ["FAMILIES", "ConvNormAct"]


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the size at stride 1, batch norm, activation."""

    def __init__(
        self, into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
    ) -> None:
        conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), act())


class Basic(nn.Module):
    """ResNet: `relu(shortcut(x) + f(x))`, with a 1 × 1 convolution as shortcut where the shape changes."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.f = nn.Sequential(ConvNormAct(into, out, 3, stride), ConvNormAct(out, out, act=nn.Identity))
        self.shortcut = nn.Identity() if into == out else ConvNormAct(into, out, 1, stride, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.f(x))


class Bottleneck(Basic):
    """1 × 1, grouped 3 × 3, 1 × 1 (ResNeXt, RegNet); the add is written in place on the branch, and so is the ReLU."""

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
    """ResNet v2: `shortcut + f(relu(norm(x)))`; nothing stands on the trunk. A shortcut reads the activated value."""

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

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * into
        self.f = nn.Sequential(
            ConvNormAct(into, wide, 1, act=nn.ReLU6),
            ConvNormAct(wide, wide, 3, stride, wide, act=nn.ReLU6),
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
    """MBConv: the inverted bottleneck with squeeze-and-excite and SiLU, and stochastic depth in training."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__(into, out, stride)
        wide = 2 * into
        self.f = nn.Sequential(
            ConvNormAct(into, wide, 1, act=nn.SiLU),
            ConvNormAct(wide, wide, 3, stride, wide, act=nn.SiLU),
            SqueezeExcite(wide),
            ConvNormAct(wide, out, 1, act=nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.residual and self.training:
            y = y * torch.empty(len(y), 1, 1, 1).bernoulli_(0.8).div_(0.8)
        return x + y if self.residual else y


class ConvNeXt(nn.Module):
    """Depthwise 7 × 7, then norm and MLP on [B, H, W, C], and back; the skip never leaves [B, C, H, W]."""

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
    """A stem, two stages of `layers` blocks, width 8 and then 16 at half the resolution, and a head."""

    def __init__(self, block: type[nn.Module], layers: int) -> None:
        super().__init__()
        first = [block(8, 8) for _ in range(layers)]
        second = [block(8 if layer == 0 else 16, 16, 2 if layer == 0 else 1) for layer in range(layers)]
        self.stem, self.stages, self.head = ConvNormAct(3, 8), nn.Sequential(*first, *second), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def _staged(
    name: str, block: type[nn.Module], *lengths: int, projected: int = 0, joined: bool = False, double: bool = False
) -> Family:
    """`lengths` are what the stages lack of their number of blocks; `joined` stages form one chain."""

    def formula(layers: int) -> tuple[int, ...]:
        stages = tuple(layers - length for length in lengths)
        return (sum(stages),) if joined else stages

    because = "a batch norm behind a linear bottleneck: means that are zero in exact arithmetic" if double else ""
    make, expected = feature_maps(lambda n: Staged(block, n)), chains(formula, projected=projected)
    return Family(name, "convolutional_blocks", make, expected, double=double, because=because)


FAMILIES: tuple[Family, ...] = (
    _staged("resnet", Basic, 0, 1, projected=1),
    _staged("regnet", Bottleneck, 0, 1, projected=1),
    _staged("preact-resnet", PreActivation, 0, 1, projected=1),
    _staged("padded-resnet", Padded, 0, 1, projected=1),
    _staged("mobilenet", Inverted, 0, 1, double=True),
    _staged("efficientnet", EfficientBlock, 0, 1, double=True),
    _staged("convnext-stages", ConvNeXt, 0, 0),
)
