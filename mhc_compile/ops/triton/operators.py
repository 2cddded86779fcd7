"""Allocations and launches: the operators. Shapes: the package; order of arguments: the schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from ._shapes import Sizes, flat
from .blocks import pack_kernel
from .coefficients_backward import coefficients_backward_kernel
from .forward import forward_kernel
from .launch import interpreted, launch
from .mixing import close_backward_kernel, close_kernel, update_backward_kernel, update_kernel
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
    streams: Tensor, mix: Sequence[Tensor], site: Sequence[Tensor], n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """Return `(new_streams, h, pre, post, res, z, inverse)`.

    `mix` is `(branch, post, res)`, or empty: then the first result is the old streams. `site` is
    `(phi, bias, scale)`.
    """
    sizes = Sizes.of(streams, n, mapping)
    x = flat(streams, 2)
    tokens, lead = x.shape[0], streams.shape[:-2]
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    new = x.new_empty(tokens, n, sizes.width) if mix else x
    h = x.new_empty(tokens, sizes.width)
    new_pre, new_post, new_res, z, inverse = (
        x.new_empty(tokens, *shape, dtype=torch.float32) for shape in ((n,), (n,), (n, n), (sizes.columns,), (1,))
    )
    phi, bias, scale = site
    weights, stride = _packed(phi, sizes)
    raw = x.new_empty(tokens, sizes.halves * sizes.columns, dtype=torch.float32)
    launch(
        forward_kernel, lambda meta: (triton.cdiv(tokens, meta["block_tokens"]),),
        x, branch, post, res, weights, bias.contiguous(), scale.contiguous(),
        new, h, new_pre, new_post, new_res, z, inverse, raw,
        tokens, sizes.width, iterations, eps,
        n=n, m=sizes.m, columns=sizes.columns, halves=sizes.halves, stride=stride, size=sizes.size,
        thin=sizes.thin(sizes.halves), mixes=bool(mix), sinkhorn_mapping=mapping == "sinkhorn",
        precision=sizes.precision, interpreted=interpreted(), block_channels=sizes.channels(128 if n <= 4 else 32),
    )  # fmt: skip
    outs = (new, h, new_pre, new_post, new_res, z, inverse)
    return tuple(tensor.reshape(*lead, *tensor.shape[1:]) for tensor in outs)


def read(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return `(h, pre, post, res, z, inverse)`; `h = Σ_j pre_j X_j`, in their dtype."""
    return _forward(streams, (), args[:3], *args[3:])[1:]


def step(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return `(streams', h', pre', post', res', z', inverse')`: `update` and the next `read`."""
    mix, site, settings = args[:3], args[3:6], args[6:]
    return _forward(streams, mix, site, mix[1].shape[-1], *settings)


def _backward(
    grads: Sequence[Tensor | None], streams: Tensor, mix: Sequence[Tensor], site: Sequence[Tensor], saved: Sequence[Tensor],
    mapping: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return `(d_streams, d_branch, d_post, d_res, d_phi, d_bias, d_scale)`.

    `grads` are those of `(new_streams, h, post, res)`, `saved` is `(pre, post, z, inverse)`.
    Without `mix` the second to fourth results are placeholders.
    """
    phi, bias, scale = site
    new_pre, new_post, z, inverse = saved
    n = new_pre.shape[-1]
    sizes = Sizes.of(streams, n, mapping)
    x = flat(streams, 2)
    tokens, width, columns = x.shape[0], sizes.width, sizes.columns
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    weight, pre = phi.contiguous(), flat(new_pre, 1)
    g_streams, g_h, g_post, g_res = (
        x if grad is None else flat(grad, axes) for grad, axes in zip(grads, (2, 1, 1, 2), strict=True)
    )
    has_streams, has_read, has_post, has_res = (grad is not None for grad in grads)

    block_tokens = 16
    programs = triton.cdiv(tokens, block_tokens)
    scaled, radial, shares, scratch = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((tokens, columns), (tokens,), (programs, columns + 3), (max(iterations - 1, 1), 2, tokens, n))
    )
    launch(
        coefficients_backward_kernel, (programs,),
        g_h, g_post, g_res, x, branch, post, res, bias.contiguous(), scale.contiguous(), pre, flat(new_post, 1),
        flat(z, 1), inverse.reshape(-1).contiguous(),
        scaled, radial, shares, scratch, tokens, width, iterations,
        n=n, m=sizes.m, columns=columns, size=sizes.size, held=sizes.held, mixes=bool(mix),
        has_read=has_read, has_post=has_post, has_res=has_res,
        block_tokens=block_tokens, block_channels=sizes.channels(128 if n <= 4 else 64), num_warps=4,
    )  # fmt: skip
    d_bias, d_scale = torch.empty_like(bias), torch.empty_like(scale)
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
        n=n, m=sizes.m, columns=columns, halves=sizes.halves, thin=sizes.thin(1), dots=sizes.dots, mixes=bool(mix),
        has_streams=has_streams, has_read=has_read, precision=sizes.precision, interpreted=interpreted(),
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
    grads, streams, site, saved, settings = args[:3], args[3], args[4:7], args[7:11], args[11:13]
    d_streams, _, _, _, *rest = _backward((None, *grads), streams, (), site, saved, *settings)
    return (d_streams, *rest)


def step_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `step` for its tensors."""
    grads, streams, mix, site, saved, settings = args[:4], args[4], args[5:8], args[8:11], args[11:15], args[15:17]
    return _backward(grads, streams, mix, site, saved, *settings)


def _tiles(sizes: Sizes) -> dict[str, Any]:
    """Return block sizes of about 2048 elements of a stream."""
    channels = sizes.channels(128)
    tokens = 2048 // channels if channels >= 64 else 16
    return {"n": sizes.n, "m": sizes.m, "block_tokens": tokens, "block_channels": channels}


def _mix(kernel: Any, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, out: Tensor) -> Tensor:
    sizes = Sizes.of(streams, post.shape[-1])
    x, tiles = flat(streams, 2), _tiles(sizes)
    grid = (triton.cdiv(x.shape[0], tiles["block_tokens"]), triton.cdiv(sizes.width, tiles["block_channels"]))
    launch(
        kernel, grid, x, flat(branch, 1), flat(post, 1), flat(res, 2), out, x.shape[0], sizes.width, **tiles
    )  # fmt: skip
    return out


def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the new streams [..., n, C]: `X'_i = Σ_j res_ij X_j + post_i y`."""
    out = streams.new_empty(*streams.shape[:-2], post.shape[-1], streams.shape[-1])
    return _mix(update_kernel, streams, branch, post, res, out)


def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the mean of the new streams, [..., C], which are neither written nor rounded."""
    return _mix(close_kernel, streams, branch, post, res, streams.new_empty(*streams.shape[:-2], streams.shape[-1]))


def _mix_backward(
    kernel: Any, grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, products: int
) -> tuple[Tensor, ...]:
    """Return `(d_streams, d_branch, d_post, d_res, partial)`; `d_post` and `d_res` are empty."""
    sizes = Sizes.of(streams, post.shape[-1])
    x, y, tiles = flat(streams, 2), flat(branch, 1), _tiles(sizes)
    tokens = x.shape[0]
    grid = (triton.cdiv(tokens, tiles["block_tokens"]), triton.cdiv(sizes.width, tiles["block_channels"]))
    d_streams, d_branch = torch.empty_like(x), torch.empty_like(y)
    partial = x.new_empty(grid[1], tokens, products, dtype=torch.float32)
    launch(
        kernel, grid, grad, x, y, flat(post, 1), flat(res, 2), d_streams, d_branch, partial, tokens, sizes.width,
        dots=sizes.dots, **tiles,
    )  # fmt: skip
    return (
        d_streams.reshape(streams.shape), d_branch.reshape(branch.shape),
        post.new_empty(post.shape), res.new_empty(res.shape), partial,
    )  # fmt: skip


def update_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `update` for `grad` [..., n, C]."""
    n, m = post.shape[-1], streams.shape[-2]
    *gradients, d_post, d_res, partial = _mix_backward(
        update_backward_kernel, flat(grad, 2), streams, branch, post, res, n + n * m
    )
    add_up_mixing(partial, d_post, d_res, n, m)
    return (*gradients, d_post, d_res)


def close_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `close` for `grad` [..., C]."""
    n, m = post.shape[-1], streams.shape[-2]
    *gradients, d_post, d_res, partial = _mix_backward(
        close_backward_kernel, flat(grad, 1), streams, branch, post, res, 1 + m
    )
    add_up(
        partial, d_post, d_res, partial.shape[1], (n, n * n),
        left_step=0, base=1, inner=n, row_step=0, column_step=int(m == n and n > 1),
    )  # fmt: skip
    return (*gradients, d_post, d_res)
