"""Allocations and launches of `read`, `step` and their backwards. Shapes: the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from mhc_compile.ops import arguments
from mhc_compile.ops.arguments import Gradients, Saved, Settings, SiteParameters

from ._shapes import Sizes, flat
from .blocks import pack_kernel
from .coefficients_backward import coefficients_backward_kernel
from .forward import forward_kernel
from .launch import interpreted, launch
from .streams_backward import streams_backward_kernel
from .sums import add_up, add_up_mixing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: Programs of the pass over the streams: some waves on the largest GPU, small partial sums of dphi.
_PROGRAMS = 512
#: Fewer tokens than this are not worth a program of that pass.
_TOKENS = 64


def _packed(phi: Tensor, sizes: Sizes) -> tuple[Tensor, int]:
    """Return the weights of the forward kernel and their row length, a multiple of 16 bytes."""
    weights = phi.contiguous()
    if sizes.halves == 1:
        return weights, sizes.columns
    stride = triton.cdiv(2 * sizes.columns, 8) * 8
    packed = phi.new_empty(phi.shape[0], stride, dtype=torch.bfloat16)
    size = sizes.n * sizes.width * sizes.columns
    launch(
        pack_kernel, (triton.cdiv(size, 1024),), weights, packed, size, columns=sizes.columns, stride=stride, block=1024
    )  # fmt: skip
    return packed, stride


def _forward(
    streams: Tensor, mix: Sequence[Tensor] | None, site: SiteParameters, n: int, settings: Settings
) -> tuple[Tensor, ...]:
    """Return `(new_streams, h, pre, post, res, z, inverse)`; the old streams without `mix`."""
    sizes = Sizes.of(streams, n, settings.mapping)
    x = flat(streams, 2)
    tokens, lead = x.shape[0], streams.shape[:-2]
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    new = x.new_empty(tokens, n, sizes.width) if mix else x
    h = x.new_empty(tokens, sizes.width)
    new_pre, new_post, new_res, z, inverse = (
        x.new_empty(tokens, *shape, dtype=torch.float32) for shape in ((n,), (n,), (n, n), (sizes.columns,), (1,))
    )
    weights, stride = _packed(site.phi, sizes)
    raw = x.new_empty(tokens, sizes.halves * sizes.columns, dtype=torch.float32)
    launch(
        forward_kernel, lambda meta: (triton.cdiv(tokens, meta["block_tokens"]),),
        x, branch, post, res, weights, site.bias.contiguous(), site.scale.contiguous(),
        new, h, new_pre, new_post, new_res, z, inverse, raw,
        tokens, sizes.width, settings.iterations, settings.eps,
        n=n, m=sizes.m, columns=sizes.columns, halves=sizes.halves, stride=stride, size=sizes.size,
        thin=sizes.thin(sizes.halves), mixes=mix is not None, sinkhorn_mapping=settings.mapping == "sinkhorn",
        precision=sizes.precision, interpreted=interpreted(), block_channels=sizes.channels(128 if n <= 4 else 32),
    )  # fmt: skip
    outs = (new, h, new_pre, new_post, new_res, z, inverse)
    return tuple(tensor.reshape(*lead, *tensor.shape[1:]) for tensor in outs)


def read(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return `(h, pre, post, res, z, inverse)`; `h = Σ_j pre_j X_j`, in their dtype."""
    site, n, settings = SiteParameters(*args[:3]), args[3], Settings(*args[4:])
    return _forward(streams, None, site, n, settings)[1:]


def step(*args: Any) -> tuple[Tensor, ...]:
    """Return `(streams', h', pre', post', res', z', inverse')`: `update` and the next `read`."""
    old, site, settings = arguments.step(*args)
    return _forward(old.streams, old[1:], site, old.post.shape[-1], settings)


def _backward(
    grad_streams: Tensor | None, grads: Gradients, streams: Tensor, mix: Sequence[Tensor] | None,
    site: SiteParameters, saved: Saved, settings: Settings,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return `(d_streams, d_branch, d_post, d_res, d_phi, d_bias, d_scale)`.

    Without `mix` the second to fourth are placeholders.
    """
    n, iterations = saved.pre.shape[-1], settings.iterations
    sizes = Sizes.of(streams, n, settings.mapping)
    x = flat(streams, 2)
    tokens, width, columns = x.shape[0], sizes.width, sizes.columns
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    weight, pre = site.phi.contiguous(), flat(saved.pre, 1)
    g_streams, g_h, g_post, g_res = (
        x if grad is None else flat(grad, axes)
        for grad, axes in ((grad_streams, 2), (grads.h, 1), (grads.post, 1), (grads.res, 2))
    )

    block_tokens = 16
    programs = triton.cdiv(tokens, block_tokens)
    scaled, radial, shares, scratch = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((tokens, columns), (tokens,), (programs, columns + 3), (max(iterations - 1, 1), 2, tokens, n))
    )
    launch(
        coefficients_backward_kernel, (programs,),
        g_h, g_post, g_res, x, branch, post, res, site.bias.contiguous(), site.scale.contiguous(), pre, flat(saved.post, 1),
        flat(saved.z, 1), saved.inverse.reshape(-1).contiguous(),
        scaled, radial, shares, scratch, tokens, width, iterations,
        n=n, m=sizes.m, columns=columns, size=sizes.size, held=sizes.held, mixes=mix is not None,
        has_read=grads.h is not None, has_post=grads.post is not None, has_res=grads.res is not None,
        block_tokens=block_tokens, block_channels=sizes.channels(128 if n <= 4 else 64), num_warps=4,
    )  # fmt: skip
    d_bias, d_scale = torch.empty_like(site.bias), torch.empty_like(site.scale)
    add_up(shares, d_bias, d_scale, 1, (columns, 3), base=columns, tall=True)

    block_channels = sizes.channels(64 if n <= 4 else 32)
    blocks = triton.cdiv(width, block_channels)
    groups = torch.sym_min(triton.cdiv(tokens, _TOKENS), triton.cdiv(_PROGRAMS, blocks))
    d_streams, d_branch = torch.empty_like(x), torch.empty_like(branch) if mix else x
    products = x.new_empty(blocks if mix else 0, tokens, n + n * sizes.m, dtype=torch.float32)
    phi_parts = x.new_empty(groups, n * width * columns, dtype=torch.float32)
    launch(
        streams_backward_kernel, (blocks, groups),
        g_streams, g_h, x, branch, post, res, weight, pre, scaled, radial,
        d_streams, d_branch, products, phi_parts, tokens, width,
        n=n, m=sizes.m, columns=columns, halves=sizes.halves, thin=sizes.thin(1), dots=sizes.dots, mixes=mix is not None,
        has_streams=grad_streams is not None, has_read=grads.h is not None, precision=sizes.precision, interpreted=interpreted(),
        block_channels=block_channels,
    )  # fmt: skip
    d_phi = torch.empty_like(weight)
    add_up(phi_parts, d_phi, d_phi, 1, (n * width * columns, 0), base=0)
    d_post, d_res = torch.empty_like(post), torch.empty_like(res)
    if mix:
        add_up_mixing(products, d_post, d_res, n, sizes.m)
        d_branch, d_post, d_res = (
            new.reshape(old.shape) for new, old in zip((d_branch, d_post, d_res), mix, strict=True)
        )
    return d_streams.reshape(streams.shape), d_branch, d_post, d_res, d_phi, d_bias, d_scale


def read_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `read`, `(d_streams, d_phi, d_bias, d_scale)`."""
    grads, streams, site, saved, settings = arguments.read_backward(*args)
    d_streams, _, _, _, *rest = _backward(None, grads, streams, None, site, saved, settings)
    return (d_streams, *rest)


def step_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `step` for its tensors."""
    grad_streams, grads, old, site, saved, settings = arguments.step_backward(*args)
    return _backward(grad_streams, grads, old.streams, old[1:], site, saved, settings)
