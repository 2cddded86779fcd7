"""Allocations and launches: the operators of a site that begins.

Shapes: the package; order of arguments: the schemas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from . import configs
from ._shapes import Sizes, flat, flat_or, numbers, vector
from .backward import backward_kernel
from .blocks import prepare_kernel
from .forward import forward_kernel
from .launch import interpreted, launch
from .norm import dots_of
from .sums import sum_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    #: Branches, `post` and `res` of sites that have ended since streams were written.
    Older = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]

#: Tokens of which a program of the second backward walk keeps the sum of dphi, or a few more, so
#: that tiles fit. Fewer move more bytes, more leave processors idle at the end.
_GROUP = 320


def _prepared(
    phi: Tensor, sizes: Sizes, counters: int, older: Older, res: Tensor, *, forward: bool
) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    """Return counters, the weights of the kernel and their row length, and coefficients.

    Rows are multiples of 16 bytes where phi is split, for the forward. The coefficients are what
    the sources weigh in the old streams and in the new ones: `res` where the old are in memory.
    """
    weights = phi.contiguous()
    zeros = phi.new_empty(counters, dtype=torch.int32)
    packs = forward and sizes.halves == 2
    stride = triton.cdiv(sizes.columns, 8) * 8 if packs else sizes.columns
    packed = phi.new_empty(2, phi.shape[0], stride, dtype=torch.bfloat16) if packs else weights
    size = phi.numel() if packs else 0
    tokens = res.shape[0] if sizes.older else 0
    combined = numbers(phi, 2, tokens, sizes.n, sizes.m)
    sites = [flat(one[k], axes) for k in range(sizes.older) for one, axes in zip(older[1:], (1, 2), strict=True)]
    launch(
        prepare_kernel, (max(triton.cdiv(max(size, counters), 1024), triton.cdiv(tokens, 128)),),
        zeros, weights, packed, counters, size, *sites, *[res] * (4 - len(sites)), res, combined, tokens,
        columns=sizes.columns, stride=stride, packs=packs, n=sizes.n, m=sizes.m, older=sizes.older, block=1024,
    )  # fmt: skip
    return zeros, packed, stride, combined[0], combined[1] if sizes.older else res


def _branches(older: Older, branch: Tensor) -> list[Tensor]:
    """Return the outputs of older branches as kernels take them: two arguments, used or not."""
    return ([flat(one, 1) for one in older[0]] + [branch] * 2)[:2]


def _forward(
    streams: Tensor, mix: Sequence[Tensor], read_pre: Tensor | None, site: Sequence[Tensor], n: int,
    mapping: str, iterations: int, eps: float,
    norm: str = "", gain: Tensor | None = None, shift: Tensor | None = None, norm_eps: float = 0.0,
    read_dtype: torch.dtype | None = None, *, older: Older = ((), (), ()), write: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return `(new_streams, h, pre, post, res, z, inverse, moments)`.

    `mix` is `(branch, post, res)`, or empty: then there is no first result. `read_pre` are weights
    for h, None for the site's own. `site` is `(phi, bias, scale)`. The old streams are those after
    the `older` sites; the new ones are [0] unless `write`.
    """
    sizes = Sizes.of(streams, n, mapping, older=len(older[0]))
    x = flat(streams, 2)
    tokens, lead = x.shape[0], streams.shape[:-2]
    nothing = x.new_empty(0)
    branch, post, res = (
        flat_or(tensor, axes, nothing) for tensor, axes in zip(mix or (None,) * 3, (1, 1, 2), strict=True)
    )
    writes = bool(mix) and write
    new = x.new_empty(tokens, n, sizes.width) if writes else nothing
    h = x.new_empty(tokens, sizes.width, dtype=read_dtype)
    new_pre, new_post, new_res, z, inverse = (
        numbers(x, tokens, *shape) for shape in ((n,), (n,), (n, n), (sizes.columns,), (1,))
    )
    moments = numbers(x, tokens, 2 if norm else 0)
    phi, bias, scale = site
    shifted = read_pre is not None and not norm
    config = configs.forward(sizes, shifted, norm)
    blocks = config.blocks
    reads = 0 if shifted else blocks["block_tokens"] // blocks["read_tokens"]
    work = configs.cut(tokens, sizes.width, blocks["block_tokens"], blocks["block_channels"], reads)
    counters, weights, stride, _, mixing = _prepared(phi, sizes, 1 + 2 * work.tiles, older, res, forward=True)
    launch(
        forward_kernel, ((work.tiles + work.lag) * (work.parts + reads),),
        x, *_branches(older, branch), branch, post, mixing, flat_or(read_pre, 1, new_pre), weights, bias.contiguous(), scale.contiguous(),
        new, h, new_pre, new_post, new_res, z, inverse, numbers(x, work.parts, sizes.columns + 1, tokens), counters,
        tokens, sizes.width, work.parts, work.each, work.lag, iterations, eps,
        vector(gain), vector(shift), moments, norm_eps,
        n=n, m=sizes.m, older=sizes.older, columns=sizes.columns, stride=stride, thin=sizes.thin, mixes=bool(mix),
        writes=writes, shifted=shifted, halves=sizes.halves, precision=sizes.precision, interpreted=interpreted(), norm=norm,
        **sizes.constants, **config.constants,
    )  # fmt: skip
    outs = (*([new] if writes else []), h, new_pre, new_post, new_res, z, inverse, moments)
    outs = tuple(tensor.reshape(*lead, *tensor.shape[1:]) for tensor in outs)
    return outs if writes or not mix else (new, *outs)


def read(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return `(h, pre, post, res, z, inverse, moments)`; `h = Σ_j pre_j X_j`, in their dtype."""
    return _forward(streams, (), None, args[:3], *args[3:])


def step(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Compute `update` and the next `read`; return the new streams, then the results of that."""
    return _forward(streams, args[:3], None, args[3:6], args[1].shape[-1], *args[6:])


def shifted_step(streams: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Compute `step`, but `h' = Σ_j pre_j X'_j` with the given `pre`."""
    return _forward(streams, args[:3], args[3], args[4:7], args[1].shape[-1], *args[7:])


def lazy_step(
    streams: Tensor, branches: Sequence[Tensor], post: Sequence[Tensor], res: Sequence[Tensor], *args: Any
) -> tuple[Tensor, ...]:
    """Compute `step` of the last of these sites; `args` are those of the next, `write` fourth."""
    mix, older = (branches[-1], post[-1], res[-1]), (branches[:-1], post[:-1], res[:-1])
    return _forward(streams, mix, None, args[:3], post[-1].shape[-1], *args[4:], older=older, write=args[3])


def _backward(
    grads: Sequence[Tensor | None], streams: Tensor, mix: Sequence[Tensor], read_pre: Tensor | None,
    site: Sequence[Tensor], saved: Sequence[Tensor], mapping: str, iterations: int, _eps: float,
    norm: str = "", gain: Tensor | None = None, shift: Tensor | None = None, moments: Tensor | None = None,
    *, older: Older = ((), (), ()),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of the old streams, `mix`, `read_pre`, `site`, gain and shift.

    `grads` are those of `(new_streams, h, pre, post, res)`, `saved` is `(pre, post, z, inverse)`.
    Without `mix` the second to fourth results are placeholders, without `read_pre` the fifth.
    """
    phi, bias, scale = site
    new_pre, new_post, z, inverse = saved
    n = new_pre.shape[-1]
    sizes = Sizes.of(streams, n, mapping, older=len(older[0]))
    x = flat(streams, 2)
    tokens, width, columns = x.shape[0], sizes.width, sizes.columns
    nothing = x.new_empty(0)
    branch, post, res = (
        flat_or(tensor, axes, nothing) for tensor, axes in zip(mix or (None,) * 3, (1, 1, 2), strict=True)
    )
    pre = flat(new_pre, 1)
    gradients = [flat_or(grad, axes, nothing) for grad, axes in zip(grads, (2, 1, 1, 1, 2), strict=True)]
    has_streams, has_read, has_pre, has_post, has_res = (grad is not None for grad in grads)
    shifted, norm = read_pre is not None, norm if has_read else ""
    read_by = pre if read_pre is None else flat(read_pre, 1)

    config = configs.backward(sizes, shifted, norm)
    blocks = triton.cdiv(width, config.blocks["block_channels"])
    dot_tokens = config.blocks["dot_tokens"]
    tile = max(dot_tokens, config.blocks["block_tokens"])
    group = triton.cdiv(_GROUP, tile) * tile
    groups = triton.cdiv(tokens, group)
    work = configs.cut(tokens, width, dot_tokens, config.blocks["dot_channels"], 1)
    parts = work.parts if has_read and (norm or not shifted) else 1
    lag = min(groups, 1)

    d_streams = x.new_empty(tokens, n, width) if sizes.older else torch.empty_like(x)
    d_branch = torch.empty_like(branch)
    count = (n + n * sizes.m if mix else 0) + (n if shifted else 0)
    products = numbers(x, blocks, count, tokens)
    phi_parts = numbers(x, groups, *phi.shape)
    shares = numbers(x, work.tiles, columns + 3)
    norm_parts = numbers(x, groups if norm else 0, 2, width)
    counters, weight, _, before, mixing = _prepared(phi, sizes, 1 + work.tiles + groups, older, res, forward=False)
    launch(
        backward_kernel, ((groups + lag) * (parts * (group // dot_tokens) + blocks),),
        x, *gradients, *_branches(older, branch), branch, post, mixing, res, read_by, weight, bias.contiguous(), scale.contiguous(),
        pre, flat(new_post, 1), flat(z, 1), inverse.reshape(-1).contiguous(),
        d_streams, d_branch, products, phi_parts, shares, numbers(x, tokens, columns), numbers(x, tokens),
        numbers(x, parts, dots_of(sizes.m + bool(mix), norm), tokens), numbers(x, max(iterations - 1, 1), 2 * n, tokens), counters,
        tokens, width, parts, work.each, group, lag, iterations,
        vector(gain), vector(shift), flat_or(moments if norm else None, 1, nothing),
        numbers(x, 2 if norm else 0, tokens), norm_parts,
        n=n, m=sizes.m, older=sizes.older, columns=columns, halves=sizes.halves, thin=sizes.thin,
        mixes=bool(mix), shifted=shifted, has_streams=has_streams, has_read=has_read, has_pre=has_pre,
        has_post=has_post, has_res=has_res, precision=sizes.precision, interpreted=interpreted(), norm=norm,
        **sizes.constants, **config.constants,
    )  # fmt: skip
    d_phi, d_bias, d_scale = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(scale)
    site = phi_parts, d_phi, shares, d_bias, d_scale
    *mixed, d_gain, d_shift = sum_up(x, sizes, mix, read_pre, products, site, (norm_parts, gain, shift), before)
    d_branch = d_branch.reshape(mix[0].shape) if mix else d_branch
    return (
        d_streams.reshape(*streams.shape[:-2], *d_streams.shape[1:]),
        d_branch,
        *mixed,
        d_phi,
        d_bias,
        d_scale,
        d_gain,
        d_shift,
    )


def read_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `read` for its tensors."""
    g_h, g_post, g_res, streams, *rest = args
    grads, site, saved = (None, g_h, None, g_post, g_res), rest[:3], rest[3:7]
    d_streams, _, _, _, _, *others = _backward(grads, streams, (), None, site, saved, *rest[7:])
    return d_streams, *others


def step_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `step` for its tensors."""
    g_streams, g_h, g_post, g_res, streams, *rest = args
    grads, mix, site, saved = (g_streams, g_h, None, g_post, g_res), rest[:3], rest[3:6], rest[6:10]
    found = _backward(grads, streams, mix, None, site, saved, *rest[10:])
    return *found[:4], *found[5:]


def lazy_step_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `lazy_step` for the old streams [..., n, C] and its own tensors."""
    g_streams, g_h, g_post, g_res, streams, branches, post, res, *rest = args
    grads, site, saved = (g_streams, g_h, None, g_post, g_res), rest[:3], rest[3:7]
    mix, older = (branches[-1], post[-1], res[-1]), (branches[:-1], post[:-1], res[:-1])
    found = _backward(grads, streams, mix, None, site, saved, *rest[7:], older=older)
    return *found[:4], *found[5:]


def shifted_step_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of `shifted_step` for its tensors."""
    grads, streams, mix, pre, site, saved = args[:5], args[5], args[6:9], args[9], args[10:13], args[13:17]
    return _backward(grads, streams, mix, pre, site, saved, *args[17:])
