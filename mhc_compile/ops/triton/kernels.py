"""The fused operators of a site on CUDA: what to allocate and which kernels to launch. Importing this module needs Triton.

Shapes, with `...` any token axes (T tokens in all), n streams of width C, and m = n, or m = 1 for n equal streams of which one is held:

    streams           [..., m, C]   float32, bfloat16 or float16
    branch            [..., C]      any floating dtype
    pre, post         [..., n]      float32
    res               [..., n, n]   float32; res[..., i, j] is the weight of old stream j in new stream i
    phi, bias, scale  [n C, K], [K], [3]; K = n² + 2 n for "sinkhorn", 2 n for "identity"
    z, inverse        [..., K], [..., 1]   float32: the projection, already divided, and 1 / rms

Source of the equations: arXiv 2512.24880 v2, section 4; the convention is that of `mhc_compile.ops.reference`. Gradients that are `None` are zero.
Launches: `update`, `close` one; `read`, `step` two for bfloat16 streams, else one; `update_backward`, `close_backward` two; `read_backward` four, `step_backward` five.
Results are deterministic: there are no atomics.

Not yet run on a GPU; checked with Triton's interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from ._shapes import Sizes, flat
from .coefficients_backward import coefficients_backward_kernel
from .forward import forward_kernel
from .launch import interpreted, launch
from .mixing import close_backward_kernel, close_kernel, update_backward_kernel, update_kernel
from .pack import pack_kernel
from .streams_backward import streams_backward_kernel
from .sums import sums_kernel

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["close", "close_backward", "read", "read_backward", "step", "step_backward", "update", "update_backward"]

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
    return tuple(tensor.reshape(*lead, *tensor.shape[1:]) for tensor in (new, h, new_pre, new_post, new_res, z, inverse))


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


def _tiles(sizes: Sizes) -> dict[str, Any]:
    """Blocks of the kernels that only mix: about 2048 elements of a stream each."""
    channels = sizes.channels(128)
    return {"n": sizes.n, "m": sizes.m, "block_tokens": 2048 // channels if channels >= 64 else 16, "block_channels": channels}


def _mix(kernel: Any, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, out: Tensor) -> Tensor:
    sizes = Sizes.of(streams, post.shape[-1])
    x, tiles = flat(streams, 2), _tiles(sizes)
    grid = (triton.cdiv(x.shape[0], tiles["block_tokens"]), triton.cdiv(sizes.width, tiles["block_channels"]))
    launch(
        kernel, grid, x, flat(branch, 1), flat(post, 1), flat(res, 2), out, x.shape[0], sizes.width, **tiles
    )  # fmt: skip
    return out


def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """New streams [..., n, C]: `X'_i = Σ_j res_ij X_j + post_i y`."""
    out = streams.new_empty(*streams.shape[:-2], post.shape[-1], streams.shape[-1])
    return _mix(update_kernel, streams, branch, post, res, out)


def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """The mean of the new streams, [..., C]. They are neither written nor rounded."""
    return _mix(close_kernel, streams, branch, post, res, streams.new_empty(*streams.shape[:-2], streams.shape[-1]))


def _add_up(
    partial: Tensor, left: Tensor, right: Tensor, rows: int, columns: tuple[int, int], *, left_step: int = 1,
    base: int, inner: int = 1, row_step: int = 1, column_step: int = 1, tall: bool = False,
) -> None:  # fmt: skip
    """Launch `sums_kernel` for `rows` rows of `columns` = (left, right) results. `tall`: few results of many parts each."""
    block, block_parts = (32, 128) if tall else (128, 8)
    launch(
        sums_kernel, (triton.cdiv(rows * sum(columns), block),),
        partial, left, right, partial.shape[0], rows, partial.shape[-1], *columns,
        left_step, base, inner, row_step, column_step, block_parts=block_parts, block=block,
    )  # fmt: skip


def _mix_backward(
    kernel: Any, grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, products: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Sizes]:
    """`(d_streams, d_branch, d_post, d_res, partial, sizes)`; the two in the middle are still empty."""
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
        post.new_empty(post.shape), res.new_empty(res.shape), partial, sizes,
    )  # fmt: skip


def update_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `update` for `grad` [..., n, C]: `(d_streams, d_branch, d_post, d_res)`, each like its tensor."""
    n, m = post.shape[-1], streams.shape[-2]
    *gradients, d_post, d_res, partial, _ = _mix_backward(
        update_backward_kernel, flat(grad, 2), streams, branch, post, res, n + n * m
    )
    _add_up_mixing(partial, d_post, d_res, n, m)
    return (*gradients, d_post, d_res)  # type: ignore[return-value]


def _add_up_mixing(partial: Tensor, d_post: Tensor, d_res: Tensor, n: int, m: int) -> None:
    """Partial products [S, T, n + n m] to `d_post` [..., n] and `d_res` [..., n, n]. One held stream stands for n: its products count for each."""
    _add_up(
        partial, d_post, d_res, partial.shape[1], (n, n * n),
        base=n, inner=n, row_step=m, column_step=int(m == n and n > 1),
    )  # fmt: skip


def close_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `close` for `grad` [..., C]: `(d_streams, d_branch, d_post, d_res)`, each like its tensor."""
    n, m = post.shape[-1], streams.shape[-2]
    *gradients, d_post, d_res, partial, _ = _mix_backward(
        close_backward_kernel, flat(grad, 1), streams, branch, post, res, 1 + m
    )
    _add_up(
        partial, d_post, d_res, partial.shape[1], (n, n * n),
        left_step=0, base=1, inner=n, row_step=0, column_step=int(m == n and n > 1),
    )  # fmt: skip
    return (*gradients, d_post, d_res)  # type: ignore[return-value]


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
    _add_up(shares, d_bias, d_scale, 1, (columns, 3), base=columns, tall=True)

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
    _add_up(phi_parts, d_phi, d_phi, 1, (n * width * columns, 0), base=0)
    d_post, d_res = torch.empty_like(post), torch.empty_like(res)
    if mix:
        _add_up_mixing(products, d_post, d_res, n, sizes.m)
        d_branch, d_post, d_res = (new.reshape(old.shape) for new, old in zip((d_branch, d_post, d_res), mix, strict=True))
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
