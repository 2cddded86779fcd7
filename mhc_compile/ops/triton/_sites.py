"""`read` and `step`, and their backwards: what to allocate and which kernels to launch. Shapes: `kernels`.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from ._partials import add_up, add_up_mixing
from ._shapes import Sizes, flat
from .coefficients_backward import coefficients_backward_kernel
from .forward import forward_kernel
from .launch import interpreted, launch
from .pack import pack_kernel
from .streams_backward import streams_backward_kernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read", "read_backward", "step", "step_backward"]

#: Programs of the pass over the streams: enough for some waves on the largest GPU, few enough that partial sums of dphi stay small.
_PROGRAMS = 512
#: Fewer tokens than this are not worth a program of that pass.
_TOKENS = 64


def _packed(phi: Tensor, sizes: Sizes) -> tuple[Tensor, int]:
    """What the forward kernel multiplies with, and the length of its rows: a multiple of 16 bytes, so that it is copied in whole words."""
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
    streams: Tensor, mix: tuple[Tensor, Tensor, Tensor] | None, phi: Tensor, bias: Tensor, scale: Tensor, n: int,
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`(new_streams, h, pre, post, res, z, inverse)`; without `mix` = (branch, post, res) the new streams are the old ones."""
    sizes = Sizes.of(streams, n, mapping)
    x = flat(streams, 2)
    tokens, lead = x.shape[0], streams.shape[:-2]
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    new = x.new_empty(tokens, n, sizes.width) if mix else x
    h = x.new_empty(tokens, sizes.width)
    new_pre, new_post, new_res, z, inverse = (
        x.new_empty(tokens, *shape, dtype=torch.float32) for shape in ((n,), (n,), (n, n), (sizes.columns,), (1,))
    )
    weights, stride = _packed(phi, sizes)
    raw = x.new_empty(tokens, sizes.halves * sizes.columns, dtype=torch.float32)
    launch(
        forward_kernel, lambda meta: (triton.cdiv(tokens, meta["block_tokens"]),),
        x, branch, post, res, weights, bias.contiguous(), scale.contiguous(),
        new, h, new_pre, new_post, new_res, z, inverse, raw,
        tokens, sizes.width, iterations, eps,
        n=n, m=sizes.m, columns=sizes.columns, halves=sizes.halves, stride=stride, size=sizes.size,
        thin=sizes.thin(sizes.halves), mixes=mix is not None, sinkhorn_mapping=mapping == "sinkhorn",
        precision=sizes.precision, interpreted=interpreted(), block_channels=sizes.channels(128 if n <= 4 else 32),
    )  # fmt: skip
    return tuple(
        tensor.reshape(*lead, *tensor.shape[1:]) for tensor in (new, h, new_pre, new_post, new_res, z, inverse)
    )


def read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """Coefficients and branch input of a site: `(h, pre, post, res, z, inverse)`; `h = Σ_j pre_j X_j`, in the dtype of the streams."""
    return _forward(streams, None, phi, bias, scale, n, mapping, iterations, eps)[1:]


def step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`update`, then `read` of the next site: `(streams', h', pre', post', res', z', inverse')`, `streams'` [..., n, C]."""
    return _forward(
        streams, (branch, post, res), phi, bias, scale, post.shape[-1], mapping, iterations, eps
    )  # fmt: skip


def _backward(
    grad_streams: Tensor | None, grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, mix: tuple[Tensor, Tensor, Tensor] | None, phi: Tensor, bias: Tensor, scale: Tensor,
    new_pre: Tensor, new_post: Tensor, z: Tensor, inverse: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`(d_streams, d_branch, d_post, d_res, d_phi, d_bias, d_scale)`; without `mix` the second to fourth are placeholders."""
    del eps  # it is in `inverse`
    n = new_pre.shape[-1]
    sizes = Sizes.of(streams, n, mapping)
    x = flat(streams, 2)
    tokens, width, columns = x.shape[0], sizes.width, sizes.columns
    branch, post, res = (flat(mix[0], 1), flat(mix[1], 1), flat(mix[2], 2)) if mix else (x, x, x)
    weight, pre = phi.contiguous(), flat(new_pre, 1)
    g_streams, g_h, g_post, g_res = (
        x if grad is None else flat(grad, axes)
        for grad, axes in ((grad_streams, 2), (grad_h, 1), (grad_post, 1), (grad_res, 2))
    )

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
        n=n, m=sizes.m, columns=columns, size=sizes.size, held=sizes.held, mixes=mix is not None,
        has_read=grad_h is not None, has_post=grad_post is not None, has_res=grad_res is not None,
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
        n=n, m=sizes.m, columns=columns, halves=sizes.halves, thin=sizes.thin(1), dots=sizes.dots, mixes=mix is not None,
        has_streams=grad_streams is not None, has_read=grad_h is not None, precision=sizes.precision, interpreted=interpreted(),
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


def read_backward(
    grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None, streams: Tensor, phi: Tensor,
    bias: Tensor, scale: Tensor, pre: Tensor, post: Tensor, z: Tensor, inverse: Tensor,
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of `read`: `(d_streams, d_phi, d_bias, d_scale)`, each like its tensor. `pre` to `inverse` are what `read` gave."""
    d_streams, _, _, _, *rest = _backward(
        None, grad_h, grad_post, grad_res, streams, None, phi, bias, scale, pre, post, z, inverse, mapping, iterations, eps
    )  # fmt: skip
    return (d_streams, *rest)


def step_backward(
    grad_streams: Tensor | None, grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    new_pre: Tensor, new_post: Tensor, z: Tensor, inverse: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of `step`: `(d_streams, d_branch, d_post, d_res, d_phi, d_bias, d_scale)`. `new_pre` to `inverse` are what `step` gave."""
    return _backward(
        grad_streams, grad_h, grad_post, grad_res, streams, (branch, post, res), phi, bias, scale,
        new_pre, new_post, z, inverse, mapping, iterations, eps,
    )  # fmt: skip
