"""One site as each candidate computes it, through its own code, cut where the branch runs.

    streams = ends.enter(x)
    h, held = site.read(streams); streams = site.write(branch(h), *held)        for every site
    x       = ends.leave(streams)

The benchmark of a site measures the part between two branches (`Cell`): the write of one site and
the read of the next. The plain model has its residual add there, and one pass over the streams is
the best that a kernel can do.

    operators  the operators of this package
    deepseek   transformers' DeepseekV4HyperConnection; mixes as its decoder layer does (combᵀ X)
    package    hyper-connections' `mHC`: projects every stream by itself (C to n + 2, not nC to
               n² + 2n), mixes when it reads, and folds the streams into the batch
    liger      liger-kernel's Triton kernels (H X, no transpose); phi in the dtype of the streams
    tile       tile-kernels' TileLang kernels; mixes as DeepSeek-V4

Other packages are imported when their site is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import HyperConnection, Options
from mhc_compile._torch.benchmarking import has_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


#: As published: initializer_range of DeepSeek-V4, and the initialization of Liger's module.
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model and of one site. The batch is 1."""

    width: int = 256  # C, a multiple of 2
    layers: int = 4  # transformer blocks of two sites
    tokens: int = 1024  # T, the sequence length
    vocabulary: int = 50257  # rows of the tied embedding
    streams: int = 4  # n
    iterations: int = 20  # of Sinkhorn
    device: str = "cpu"  # "cpu" or "cuda"
    dtype: str = "float32"  # of trunk, streams and blocks, as torch names it. Coefficients are float32.

    @property
    def sites(self) -> int:
        """Residual adds of the model: attention and MLP of every block."""
        return 2 * self.layers

    @property
    def heads(self) -> int:
        """Attention heads of 64 channels, as in GPT-2; one if 64 does not divide the width."""
        return self.width // 64 if self.width % 64 == 0 else 1

    @property
    def coefficients(self) -> int:
        """Columns of the projection of one site, n² + 2n."""
        return self.streams**2 + 2 * self.streams

    @property
    def real(self) -> torch.dtype:
        """The `torch.dtype` that `dtype` names."""
        value = getattr(torch, self.dtype)
        assert isinstance(value, torch.dtype)
        return value


class Residual(nn.Module):
    """The residual connection of one site."""

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the branch input [1, T, C], and the tensors held for `write`."""
        raise NotImplementedError

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        """Return the new streams from the branch output [1, T, C] and what `read` held."""
        raise NotImplementedError


class StreamEnds(nn.Module):
    """`enter` and `leave` of an implementation; by default copies [1, T, n, C], and their mean."""

    def __init__(
        self,
        shape: Shape,
        enter: Callable[[Tensor], Tensor] | None = None,
        leave: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.streams = shape.streams
        self.enter, self.leave = enter or self._copies, leave or (lambda streams: streams.mean(-2))

    def _copies(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.streams, x.shape[-1]).contiguous()


class _Cell(nn.Module):
    """The write of a site and the read of the next: `(branch, *held)` to `(h, *held')`."""

    def __init__(self, site: Residual) -> None:
        super().__init__()
        self.site = site

    def forward(self, branch: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        h, rest = self.site.read(self.site.write(branch, *held))
        return h, *rest


class _PlainCell(nn.Module):
    """The plain model between two branches: `(branch, x)` to `x + branch`, [1, T, C] each."""

    def forward(self, branch: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (x + branch,)


def cell(shape: Shape, site: Residual, ends: StreamEnds) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a site as a module, `(branch, *held)` to `(h, *held')`, and its inputs."""
    return _Cell(site), _inputs(shape, site, ends)


def own_cell(shape: Shape, options: Mapping[str, Any], *, fused: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a site of this package; `fused` makes it one operator, if the device has a kernel."""
    site, ends = _OperatorsSite(shape, options), StreamEnds(shape)
    if site.connection.single_pass:
        branch, streams, *rest = _inputs(shape, site, ends)
        pre = site.connection.coefficients(streams)[0].detach().requires_grad_()
        return _SinglePassCell(site), (branch, streams, *rest, pre)
    if fused and step_available(shape):
        return _StepCell(site), _inputs(shape, site, ends)
    return cell(shape, site, ends)


def plain_cell(shape: Shape) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a residual add, and its inputs."""
    branch, streams, *_ = _inputs(shape, _OperatorsSite(shape, {}), StreamEnds(shape))
    return _PlainCell(), (branch, streams[..., 0, :].detach().clone().requires_grad_())


def step_available(shape: Shape) -> bool:
    """Return whether `mhc::step` has a kernel for the device of `shape`."""
    return has_kernel("mhc::step", shape.device)


@torch.no_grad()
def _inputs(shape: Shape, site: Residual, ends: StreamEnds) -> tuple[Tensor, ...]:
    """Return inputs of a cell, `(branch, *held)`, from streams that differ from each other."""
    branch, x = (torch.randn(1, shape.tokens, shape.width, device=shape.device, dtype=shape.real) for _ in range(2))
    streams = ends.enter(x)
    streams = streams + 0.5 * torch.randn_like(streams)
    _, held = site.read(streams)
    return tuple(tensor.detach().clone().requires_grad_() for tensor in (branch, *held))


class _OperatorsSite(Residual):
    """`X' = H_res X + H_postᵀ f` by `mhc::coefficients`, `mhc::collapse` and `mhc::update`."""

    def __init__(self, shape: Shape, options: Mapping[str, Any]) -> None:
        super().__init__()
        # With the preserving init phi is zero: a product that no later step of a training has.
        own = Options(streams=shape.streams, iterations=shape.iterations, init="random", **options)
        self.connection = HyperConnection(shape.width, own, device=shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        pre, post, res = self.connection.coefficients(streams)
        return torch.ops.mhc.collapse(streams, pre), (streams, post, res)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        return torch.ops.mhc.update(held[0], branch, held[1], held[2])  # type: ignore[no-any-return]


class _StepCell(nn.Module):
    """The cell as one operator, `mhc::step`, which passes over the streams once."""

    def __init__(self, site: _OperatorsSite) -> None:
        super().__init__()
        self.connection = site.connection

    def forward(self, branch: Tensor, streams: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
        c = self.connection
        out = torch.ops.mhc.step(streams, branch, post, res, c.phi, c.bias, c.scale, c.spec, c.iterations, c.eps)
        new, h, _, new_post, new_res = out[:5]
        return h, new, new_post, new_res


class _SinglePassCell(nn.Module):
    """The cell of a single pass: the `pre` of the site that ends collapses the new streams."""

    def __init__(self, site: _OperatorsSite) -> None:
        super().__init__()
        self.connection = site.connection

    def forward(self, branch: Tensor, streams: Tensor, post: Tensor, res: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
        c = self.connection
        site = (c.phi, c.bias, c.scale, c.spec, c.iterations, c.eps)
        new, h, next_pre, next_post, next_res = torch.ops.mhc.shifted_step(streams, branch, post, res, pre, *site)[:5]
        return h, new, next_post, next_res, next_pre


def _deepseek(shape: Shape, name: str, prefix: str) -> Any:
    """Return a module of transformers' DeepSeek-V4, initialized."""
    from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4

    config = configuration_deepseek_v4.DeepseekV4Config(
        hidden_size=shape.width, hc_mult=shape.streams, hc_sinkhorn_iters=shape.iterations, initializer_range=_STD
    )
    module = getattr(modeling_deepseek_v4, name)(config)
    nn.init.normal_(getattr(module, f"{prefix}fn"), std=_STD)
    nn.init.zeros_(getattr(module, f"{prefix}base"))
    nn.init.ones_(getattr(module, f"{prefix}scale"))
    return module.to(shape.device)


class _DeepseekSite(Residual):
    """`DeepseekV4HyperConnection`, mixing as its decoder layer does: `X' = combᵀ X + post f`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.connection = _deepseek(shape, "DeepseekV4HyperConnection", "")

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        post, comb, h = self.connection(streams)
        return h, (streams, post, comb)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        streams, post, comb = held
        mixed = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
        return post.to(streams.dtype).unsqueeze(-1) * branch.unsqueeze(-2) + mixed


class _PackageSite(Residual):
    """`hyper_connections.mHC`: `X' = mixed + beta f`. Streams are [n, T, C]."""

    def __init__(self, shape: Shape, index: int = 0) -> None:
        super().__init__()
        from hyper_connections import mHC

        self.connection = mHC(shape.streams, dim=shape.width, layer_index=index, sinkhorn_iters=shape.iterations)
        self.to(shape.device)

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, mixed, rest = self.connection.width_connection(streams)
        return h, (mixed, rest["beta"])

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        return self.connection.depth_connection(branch, held[0], beta=held[1])  # type: ignore[no-any-return]


def _package_ends(shape: Shape) -> StreamEnds:
    """Return the package's copies [n, T, C], and their sum."""
    from hyper_connections import mc_get_expand_reduce_stream_functions

    return StreamEnds(shape, *mc_get_expand_reduce_stream_functions(shape.streams))


class _LigerSite(Residual):
    """The functions that `LigerMHC` calls around its layer: `X' = H_res X + H_postᵀ f`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from liger_kernel.transformers import functional, mhc

        sizes = {"hc": shape.streams, "c": shape.width, "tmax": shape.iterations, "phi_dtype": shape.real}
        self.connection = mhc.LigerMHC(nn.Identity(), **sizes, allow_fp32=shape.real == torch.float32)
        self.functional = functional

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        c = self.connection
        names = ("allow_fp32", "tmax", "rms_eps", "pre_eps", "sinkhorn_eps", "post_mult")
        tensors = (c.phi, c.b, c.alpha_pre, c.alpha_post, c.alpha_res)
        pre, *rest = self.functional.liger_mhc_coeffs(streams, *tensors, **{name: getattr(c, name) for name in names})
        return self.functional.liger_mhc_pre(streams, pre), (streams, *rest)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        return self.functional.liger_mhc_post_res(held[0], branch.contiguous(), *held[1:])  # type: ignore[no-any-return]


class _TileSite(Residual):
    """TileKernels' functional mHC for bfloat16 streams: `X' = combᵀ X + post f`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sizes = {"mhc_mult": shape.streams, "sinkhorn_repeat": shape.iterations, "post_mult_value": 2.0}
        self.fn = nn.Parameter(_STD * torch.randn(shape.coefficients, shape.streams * shape.width))
        self.base, self.scale = nn.Parameter(torch.zeros(shape.coefficients)), nn.Parameter(torch.ones(3))

    def read(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        from tile_kernels.modeling.mhc.functional import mhc_pre

        h, held = mhc_pre(streams, self.fn, self.scale, self.base, **self.sizes)
        return h, (streams, *held)

    def write(self, branch: Tensor, *held: Tensor) -> Tensor:
        from tile_kernels.modeling.mhc.ops import mhc_post

        return mhc_post(branch.contiguous(), *held)  # type: ignore[no-any-return]


#: Builders of a site, from the sizes and its place in the model, and of the ends of the streams.
CONNECTIONS: dict[str, tuple[Callable[[Shape, int], Residual], Callable[[Shape], StreamEnds]]] = {
    "operators": (lambda shape, _: _OperatorsSite(shape, {}), StreamEnds),
    "deepseek": (
        lambda shape, _: _DeepseekSite(shape),
        lambda shape: StreamEnds(shape, leave=_deepseek(shape, "DeepseekV4HyperHead", "hc_")),  # a learned sum
    ),
    "package": (_PackageSite, _package_ends),
    "liger": (lambda shape, _: _LigerSite(shape).to(shape.device), StreamEnds),
    "tile": (lambda shape, _: _TileSite(shape).to(shape.device), StreamEnds),
}
