"""Networks whose output is an image: U-Nets, super-resolution, dense connections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Attention, FeedForward, feature_maps
from mhc_compile.tools.zoo.family import Family, chains, no_chain

__all__ = ["FAMILIES"]


class ResidualConv(nn.Module):
    """`x + conv(silu(norm(x)))` twice: the block of diffusion U-Nets, on group norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Residual blocks at two resolutions; what the decoder gets back from the encoder is concatenated."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2)
        self.encoder, self.middle, self.decoder = (
            nn.Sequential(*(ResidualConv(8) for _ in range(layers))) for _ in range(3)
        )
        self.merge, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.encoder(self.stem(x))
        low = self.middle(self.down(high))
        return self.head(self.decoder(self.merge(torch.cat([self.up(low), high], dim=1))))


class DenseBlock(nn.Module):
    """Each convolution reads the concatenation of all before; the block adds a fifth of the result to its input."""

    def __init__(self, width: int = 8, grow: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width + i * grow, grow if i < 2 else width, 3, 1, 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, dim=1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(seen, dim=1))


class NestedDense(nn.Module):
    """RRDB: three dense blocks in a row, and a fifth of their result on the input of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.blocks(x)


class SuperResolution(nn.Module):
    """Nested blocks, a convolution, and a skip over all of them; then up."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem, self.trunk, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 1, 1)
        self.blocks = nn.Sequential(*(NestedDense() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.pixel_shuffle(self.head(x + self.trunk(self.blocks(x))), 2)


class DenseNet(nn.Module):
    """Concatenation alone: there is nothing to add."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * layer, 4, 3, 1, 1) for layer in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.cat([x, F.relu(conv(x))], dim=1)
        return x


class LongSkips(nn.Module):
    """U-ViT: the second half of the blocks gets the trunk of the first half back through a linear layer over both."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, WIDTH, 2, 2)
        self.first, self.second = (nn.ModuleList(_Block() for _ in range(layers)) for _ in range(2))
        self.merge, self.out = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(layers)), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).flatten(2).transpose(1, 2)
        kept = []
        for block in self.first:
            x = block(x)
            kept.append(x)
        for block, merge in zip(self.second, self.merge, strict=True):
            x = block(merge(torch.cat([x, kept.pop()], dim=-1)))
        return self.out(x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class SpatialAttention(nn.Module):
    """A convolutional residual block, then attention over the pixels whose result returns to [B, C, H, W] (the middle of a VAE)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, WIDTH, 3, 1, 1), nn.GroupNorm(2, WIDTH), nn.Conv2d(WIDTH, 3, 1)
        self.convs = nn.ModuleList(ResidualConv(WIDTH) for _ in range(layers))
        self.attns = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, attn in zip(self.convs, self.attns, strict=True):
            x = conv(x)
            pixels = attn(self.norm(x).flatten(2).transpose(1, 2))
            x = x + pixels.transpose(1, 2).reshape(x.shape)
        return self.head(x)


class BothLayouts(nn.Module):
    """CoAtNet, MaxViT: a convolutional residual on [B, C, H, W], then one of attention on [B, H·W, C]; the trunk is turned in between."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, 3, 1)
        self.convs = nn.ModuleList(ResidualConv(WIDTH) for _ in range(layers))
        self.blocks = nn.ModuleList(_Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, block in zip(self.convs, self.blocks, strict=True):
            x = conv(x)
            x = block(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(x)


_GROUP = "dense_prediction"
FAMILIES: tuple[Family, ...] = (
    Family("residual-unet", _GROUP, feature_maps(UNet), chains(lambda n: (n, n, n))),
    Family("rrdb", _GROUP, feature_maps(SuperResolution), chains(lambda n: (3 * n, 1))),
    Family("densenet", _GROUP, feature_maps(DenseNet), chains(no_chain)),
    Family("uvit", _GROUP, feature_maps(LongSkips), chains(lambda n: (2 * n, *(2 for _ in range(n))))),
    Family("both-layouts", _GROUP, feature_maps(BothLayouts), chains(lambda n: (3 * n,))),
    Family("vae-middle", _GROUP, feature_maps(SpatialAttention, size=4), chains(lambda n: (2 * n,))),
)
