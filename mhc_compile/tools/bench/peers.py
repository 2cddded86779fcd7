"""The formulations of others, each through its own code, cut into sites. Nothing here is imported before its contender is built.

deepseek-v4        transformers' DeepseekV4HyperConnection and its head; mixing as its decoder layer does it (combᵀ X)
hyper-connections  the `mHC` of the package: it normalises and projects every stream by itself (C to n + 2, not nC to n² + 2n), mixes the
                   streams when it reads, and folds them into the batch
liger-kernel       its Triton kernels for the coefficients, the collapse and the update (H X, no transpose); phi in the dtype of the streams
tile-kernels       its TileLang kernels; mixing as DeepSeek-V4
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile.tools.bench.residual import Ends, Residual

if TYPE_CHECKING:
    from mhc_compile.tools.bench.shape import Shape

__all__ = [
    "DeepseekEnds",
    "DeepseekSite",
    "LigerSite",
    "PackageEnds",
    "PackageSite",
    "TileSite",
]

#: As in the published configurations: initializer_range of DeepSeek-V4, and the start of Liger's module.
_STD = 0.02


def _deepseek_config(shape: Shape) -> Any:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    return DeepseekV4Config(
        hidden_size=shape.width, hc_mult=shape.streams, hc_sinkhorn_iters=shape.iterations, initializer_range=_STD
    )


class DeepseekSite(Residual):
    """`DeepseekV4HyperConnection`, with the mixing of `DeepseekV4DecoderLayer`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        self.connection = DeepseekV4HyperConnection(_deepseek_config(shape))
        nn.init.normal_(self.connection.fn, std=_STD)
        nn.init.zeros_(self.connection.base)
        nn.init.ones_(self.connection.scale)
        self.to(shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Holds `(streams, post, comb)`."""
        post, comb, h = self.connection(streams)
        return h, (streams, post, comb)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """`X' = combᵀ X + post f`."""
        streams, post, comb = held
        dtype = streams.dtype
        mixed = torch.matmul(comb.to(dtype).transpose(-1, -2), streams)
        return post.to(dtype).unsqueeze(-1) * branch.unsqueeze(-2) + mixed


class DeepseekEnds(Ends):
    """Copies, and `DeepseekV4HyperHead` at the end."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.streams)
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

        self.head = DeepseekV4HyperHead(_deepseek_config(shape))
        nn.init.normal_(self.head.hc_fn, std=_STD)
        nn.init.zeros_(self.head.hc_base)
        nn.init.ones_(self.head.hc_scale)
        self.to(shape.device)

    def leave(self, streams: Tensor) -> Tensor:
        """A learned weighted sum."""
        return self.head(streams)  # type: ignore[no-any-return]


class PackageSite(Residual):
    """`hyper_connections.mHC`. Streams are [n, T, C], folded into the batch as the package has them."""

    def __init__(self, shape: Shape, index: int = 0) -> None:
        super().__init__()
        from hyper_connections import mHC

        self.connection = mHC(shape.streams, dim=shape.width, layer_index=index, sinkhorn_iters=shape.iterations)
        self.to(shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Holds `(mixed streams, beta)`: this formulation mixes before the branch."""
        h, mixed, rest = self.connection.width_connection(streams)
        return h, (mixed, rest["beta"])

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """`X' = mixed + beta f`."""
        return self.connection.depth_connection(branch, held[0], beta=held[1])  # type: ignore[no-any-return]


class PackageEnds(Ends):
    """The package's own: copies, and their sum."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.streams)
        from hyper_connections import mc_get_expand_reduce_stream_functions

        self.expand, self.reduce = mc_get_expand_reduce_stream_functions(shape.streams)

    def enter(self, x: Tensor) -> Tensor:
        """[1, T, C] to [n, T, C]."""
        return self.expand(x)  # type: ignore[no-any-return]

    def leave(self, streams: Tensor) -> Tensor:
        """[n, T, C] to [1, T, C]."""
        return self.reduce(streams)  # type: ignore[no-any-return]


class LigerSite(Residual):
    """`LigerMHC` without the layer that it wraps: the three functions that its forward calls."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from liger_kernel.transformers.mhc import LigerMHC

        self.connection = LigerMHC(
            nn.Identity(),
            hc=shape.streams,
            c=shape.width,
            tmax=shape.iterations,
            phi_dtype=shape.real,
            allow_fp32=shape.real == torch.float32,
        )
        self.to(shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Holds `(streams, post, res)`."""
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_pre

        c = self.connection
        settings = {
            name: getattr(c, name) for name in ("allow_fp32", "tmax", "rms_eps", "pre_eps", "sinkhorn_eps", "post_mult")
        }
        pre, post, res = liger_mhc_coeffs(streams, c.phi, c.b, c.alpha_pre, c.alpha_post, c.alpha_res, **settings)
        return liger_mhc_pre(streams, pre), (streams, post, res)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """`X' = H_res X + H_postᵀ f`."""
        from liger_kernel.transformers.functional import liger_mhc_post_res

        return liger_mhc_post_res(held[0], branch.contiguous(), held[1], held[2])  # type: ignore[no-any-return]


class TileSite(Residual):
    """TileKernels' functional mHC: bfloat16 streams and float32 parameters only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.streams, self.iterations = shape.streams, shape.iterations
        columns = shape.coefficients
        self.fn = nn.Parameter(_STD * torch.randn(columns, shape.streams * shape.width))
        self.base, self.scale = nn.Parameter(torch.zeros(columns)), nn.Parameter(torch.ones(3))
        self.to(shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Holds `(streams, post, comb)`."""
        from tile_kernels.modeling.mhc.functional import mhc_pre

        h, (post, comb) = mhc_pre(
            streams,
            self.fn,
            self.scale,
            self.base,
            mhc_mult=self.streams,
            post_mult_value=2.0,
            sinkhorn_repeat=self.iterations,
        )
        return h, (streams, post, comb)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """`X' = combᵀ X + post f`."""
        from tile_kernels.modeling.mhc.ops import mhc_post

        return mhc_post(branch.contiguous(), *held)  # type: ignore[no-any-return]
