"""Allocations and launches of `update`, `close` and their backwards. Shapes: the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from ._shapes import Sizes, flat
from .launch import launch
from .mixing import close_backward_kernel, close_kernel, update_backward_kernel, update_kernel
from .sums import add_up, add_up_mixing

if TYPE_CHECKING:
    from torch import Tensor


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
