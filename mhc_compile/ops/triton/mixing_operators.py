"""Allocations and launches: the operators without a projection, as in `operators`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from . import configs
from ._shapes import Sizes, flat, flat_or, numbers, vector
from .launch import launch
from .mixing import close_backward_kernel, close_kernel, update_backward_kernel, update_kernel
from .sums import sum_up

if TYPE_CHECKING:
    from torch import Tensor


def _update(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor | None,
    norm: str = "", gain: Tensor | None = None, shift: Tensor | None = None, norm_eps: float = 0.0,
    read_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = Sizes.of(streams, post.shape[-1])
    x, tiles = flat(streams, 2), configs.mixing(sizes, 8 if norm else 4)
    nothing = x.new_empty(0)
    new = x.new_empty(*streams.shape[:-2], sizes.n, sizes.width)
    h = x.new_empty(*streams.shape[:-2], sizes.width, dtype=read_dtype) if pre is not None else nothing
    moments = numbers(x, *streams.shape[:-2], 2 if norm else 0)
    launch(
        update_kernel, _grid(x, tiles, norm), x, flat(branch, 1), flat(post, 1), flat(res, 2),
        flat_or(pre, 1, nothing), new, h, x.shape[0], sizes.width, vector(gain), vector(shift), moments, norm_eps,
        n=sizes.n, m=sizes.m, reads=pre is not None, norm=norm, **tiles,
    )  # fmt: skip
    return new, h, moments


def _grid(x: Tensor, tiles: dict[str, Any], norm: str = "") -> tuple[int, int]:
    tokens, blocks = triton.cdiv(x.shape[0], tiles["block_tokens"]), triton.cdiv(x.shape[-1], tiles["block_channels"])
    return tokens, 1 if norm else blocks


def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the new streams [..., n, C]: `X'_i = Σ_j res_ij X_j + post_i y`."""
    return _update(streams, branch, post, res, None)[0]


def mix_read(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new streams, `h = Σ_j pre_j X'_j`, and the moments of its norm."""
    return _update(*args)


def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the mean of the new streams, [..., C], which are neither written nor rounded."""
    sizes = Sizes.of(streams, post.shape[-1])
    x, tiles = flat(streams, 2), configs.mixing(sizes)
    mean = x.new_empty(*streams.shape[:-2], sizes.width)
    launch(
        close_kernel, _grid(x, tiles), x, flat(branch, 1), flat(post, 1), flat(res, 2), mean, x.shape[0], sizes.width,
        n=sizes.n, m=sizes.m, **tiles,
    )  # fmt: skip
    return mean


def _update_backward(
    grad: Tensor | None, grad_read: Tensor | None, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor,
    pre: Tensor | None, norm: str = "", gain: Tensor | None = None, shift: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = Sizes.of(streams, post.shape[-1])
    x, y, tiles = flat(streams, 2), flat(branch, 1), configs.mixing(sizes, 8)
    norm = norm if grad_read is not None else ""
    tokens, grid, reads, nothing = x.shape[0], _grid(x, tiles), pre is not None, x.new_empty(0)
    d_streams, d_branch = torch.empty_like(x), torch.empty_like(y)
    partial = numbers(x, grid[1], sizes.n * (1 + sizes.m + reads), tokens)
    norm_parts = numbers(x, grid[0] if norm else 0, 2, sizes.width)
    launch(
        update_backward_kernel, _grid(x, tiles, norm), x, flat_or(grad, 2, nothing), flat_or(grad_read, 1, nothing),
        y, flat(post, 1), flat(res, 2), flat_or(pre, 1, nothing), d_streams, d_branch, partial, tokens, sizes.width,
        vector(gain), vector(shift), flat_or(moments if norm else None, 1, nothing), norm_parts,
        n=sizes.n, m=sizes.m, has_streams=grad is not None, has_read=grad_read is not None,
        reads=reads, norm=norm, **tiles,
    )  # fmt: skip
    mixed = sum_up(x, sizes, (branch, post, res), pre, partial, norm=(norm_parts, gain, shift))
    return d_streams.reshape(streams.shape), d_branch.reshape(branch.shape), *mixed


def update_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `update` for `grad` [..., n, C]."""
    return _update_backward(grad, None, streams, branch, post, res, None)[:4]


def mix_read_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `mix_read` for its tensors."""
    return _update_backward(*args)


def close_backward(grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `close` for `grad` [..., C]."""
    sizes = Sizes.of(streams, post.shape[-1])
    x, y, tiles = flat(streams, 2), flat(branch, 1), configs.mixing(sizes, 8)
    tokens, grid = x.shape[0], _grid(x, tiles)
    d_streams, d_branch = torch.empty_like(x), torch.empty_like(y)
    partial = numbers(x, grid[1], 1 + sizes.m, tokens)
    launch(
        close_backward_kernel, grid, x, flat(grad, 1), y, flat(post, 1), flat(res, 2), d_streams, d_branch, partial,
        tokens, sizes.width, n=sizes.n, m=sizes.m, **tiles,
    )  # fmt: skip
    mixed = sum_up(x, sizes, (branch, post, res), None, partial, mean=True)
    return d_streams.reshape(streams.shape), d_branch.reshape(branch.shape), *mixed[:2]
