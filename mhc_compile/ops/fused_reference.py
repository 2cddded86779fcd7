"""The fused operators as compositions: the end of one site together with the start of the next.

    read          coefficients and collapse: the part of a site before its branch
    step          the update of one site and the read of the next
    shifted_step  the same in a single pass: the next site reads with weights that are known before
    mix_read      an update and a collapse with such weights, without coefficients
    close         the update of a chain's last site and the mean of its streams, never written

Streams are [..., m, C] with m = n, or m = 1 for n equal streams, of which one is kept in memory.
All but `close` take a norm of the branch's input with them (`mhc_compile.ops.norm_reference`).

These functions are the kernels of devices that have none of their own, and the decompositions that
Inductor gets there; `mhc_compile.ops.cpu` and `mhc_compile.ops.triton` are tested against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhc_compile.ops import reference
from mhc_compile.ops.norm_reference import normed, normed_backward

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor


def spread(streams: Tensor, n: int) -> Tensor:
    """Expand [..., m, C] to [..., n, C], as a view."""
    return streams.expand(*streams.shape[:-2], n, streams.shape[-1])


def _gathered(grad: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of `spread`."""
    return grad.sum(-2, keepdim=True) if like.shape[-2] != grad.shape[-2] else grad


def empty_results(
    name: str, streams: Tensor, n: int, phi: Tensor | None = None, norm: str = "", read_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return new tensors for the results of an operator above, or of `update`, contiguous."""
    width = streams.shape[-1]
    wide = (*([(n, width)] if name not in ("read", "close") else []), *([(width,)] if name != "update" else []))
    narrow = [(n,), (n,), (n, n), (phi.shape[-1],), (1,)] if phi is not None else []
    narrow += [(2 if norm else 0,)] if name not in ("update", "close") else []
    new = [streams.new_empty((*streams.shape[:-2], *shape)) for shape in wide]
    if read_dtype is not None:
        new[-1] = new[-1].to(read_dtype)
    dtype = reference.compute_dtype(streams)
    return [*new, *(streams.new_empty((*streams.shape[:-2], *shape), dtype=dtype) for shape in narrow)]


def _old_h(given: Mapping[str, Any]) -> Tensor:
    """Return h again, from the arguments of a backward by name."""
    streams, pre = given["streams"], given["next_pre" if "next_pre" in given else "pre"]
    if "res" in given:
        mix = (given[key] for key in ("branch", "post", "res"))
        streams, pre = reference.update_fused(spread(streams, pre.shape[-1]), *mix), given.get("pre", pre)
    return reference.collapse_fused(spread(streams, pre.shape[-1]), pre)


@normed(at=0)
def read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `(h, pre, post, res, z, inverse)` of one site for streams [..., m, C].

    `h` [..., C] is the input of the branch in the dtype of the streams; `pre` [..., n], `post`
    [..., n] and `res` [..., n, n] are those of `reference.coefficients`; the projection `z`
    [..., K] and `inverse` [..., 1], one over the root mean square of the streams, are for the
    backward.
    """
    wide = spread(streams, n)
    pre, *rest = _coefficients(wide, phi, bias, scale, mapping, iterations, eps)
    return reference.collapse_fused(wide, pre), pre, *rest  # type: ignore[return-value]


def _coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """Return `(pre, post, res, z, inverse)` of streams [..., n, C]."""
    *found, z = reference.coefficients(streams, phi, bias, scale, mapping, iterations, eps)
    return *found, z, reference.inverse_rms(streams.flatten(-2).to(z.dtype), eps)


@normed_backward(_old_h)
def read_backward(
    grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    pre: Tensor, post: Tensor, z: Tensor,
    inverse: Tensor,  # noqa: ARG001 - kernels take it; here it is computed again, fused with what reads it
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of `read` for `(streams, phi, bias, scale)`; None stands for zero."""
    wide = spread(streams, pre.shape[-1])
    d_wide, d_pre = (None, None) if grad_h is None else reference.collapse_backward_fused(grad_h, wide, pre)
    site, saved = (phi, bias, scale), (pre, post, z)
    d_streams, *d_site = _coefficients_backward(
        d_pre, grad_post, grad_res, wide, *site, *saved, mapping, iterations, eps
    )
    return _gathered(d_streams if d_wide is None else d_streams + d_wide, streams), *d_site


def _coefficients_backward(
    grad_pre: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, pre: Tensor, post: Tensor, z: Tensor,
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of `_coefficients` for its tensors; None stands for zero."""
    d_pre = torch.zeros_like(pre) if grad_pre is None else grad_pre
    d_post = torch.zeros_like(post) if grad_post is None else grad_post
    d_res = pre.new_zeros((*pre.shape, pre.shape[-1])) if grad_res is None else grad_res
    site, saved = (phi, bias, scale), (pre, post, z)
    return reference.coefficients_backward(
        d_pre, d_post, d_res, torch.zeros_like(z), streams, *site, *saved, mapping, iterations, eps
    )


@normed(at=1)
def step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor,
    phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `(streams', h', pre', post', res', z', inverse')`: the update, then the next `read`.

    `post` [..., n] and `res` [..., n, n] are coefficients of the site that ends, `phi`, `bias` and
    `scale` parameters of the one that begins.
    """
    n = post.shape[-1]
    after = reference.update_fused(spread(streams, n), branch, post, res)
    return after, *read(after, phi, bias, scale, n, mapping, iterations, eps)[:-1]


@normed_backward(_old_h)
def step_backward(
    grad_streams: Tensor | None, grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    next_pre: Tensor, next_post: Tensor, z: Tensor, inverse: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of `step` for its tensors. The new streams are computed again."""
    wide = spread(streams, post.shape[-1])
    after = reference.update_fused(wide, branch, post, res)
    grads, site, saved = (grad_h, grad_post, grad_res), (phi, bias, scale), (next_pre, next_post, z, inverse)
    d_after, *d_site = read_backward(*grads, after, *site, *saved, mapping, iterations, eps)[:4]
    if grad_streams is not None:
        d_after = d_after + grad_streams
    d_wide, *d_old = reference.update_backward_fused(d_after, wide, branch, post, res)
    return _gathered(d_wide, streams), *d_old, *d_site


@normed(at=1)
def shifted_step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor,
    phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `(streams', h', pre', post', res', z', inverse')` of `mix_read` and coefficients.

    As in `step`, but `h' = Σ_j pre_j X'_j` has the weights `pre` [..., n] of the site that ends,
    and `pre'` is for the site after the one that begins: `Preset.single_pass`.
    """
    after, h, _ = mix_read(streams, branch, post, res, pre)
    return after, h, *_coefficients(after, phi, bias, scale, mapping, iterations, eps)


@normed_backward(_old_h)
def shifted_step_backward(
    grad_streams: Tensor | None, grad_h: Tensor | None,
    grad_pre: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    next_pre: Tensor, next_post: Tensor, z: Tensor,
    inverse: Tensor,  # noqa: ARG001 - kernels take it; here it is computed again, fused with what reads it
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of `shifted_step` for its tensors; None stands for zero."""
    after = reference.update_fused(spread(streams, post.shape[-1]), branch, post, res)
    site, saved = (phi, bias, scale), (next_pre, next_post, z)
    d_after, *d_site = _coefficients_backward(
        grad_pre, grad_post, grad_res, after, *site, *saved, mapping, iterations, eps
    )
    d_after = d_after if grad_streams is None else d_after + grad_streams
    return *mix_read_backward(d_after, grad_h, streams, branch, post, res, pre)[:5], *d_site


@normed(at=1)
def mix_read(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(streams', h')`: the update, and `h' = Σ_j pre_j X'_j` [..., C], `pre` [..., n]."""
    after = reference.update_fused(spread(streams, post.shape[-1]), branch, post, res)
    return after, reference.collapse_fused(after, pre)


@normed_backward(_old_h)
def mix_read_backward(
    grad_streams: Tensor | None, grad_h: Tensor | None,
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of `mix_read` for its tensors; None stands for zero."""
    wide = spread(streams, post.shape[-1])
    after = reference.update_fused(wide, branch, post, res)
    d_after, d_pre = torch.zeros_like(after) if grad_streams is None else grad_streams, torch.zeros_like(pre)
    if grad_h is not None:
        d_read, d_pre = reference.collapse_backward_fused(grad_h, after, pre)
        d_after = d_after + d_read
    d_wide, *d_old = reference.update_backward_fused(d_after, wide, branch, post, res)
    return _gathered(d_wide, streams), *d_old, d_pre.to(pre.dtype)


def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the mean of the new streams, [..., C].

    `Σ_l (mean_i res_il) X_l + (mean_i post_i) f`.
    """
    dtype = reference.compute_dtype(streams)
    weights = res.to(dtype).mean(-2)
    mixed = (weights.unsqueeze(-1) * spread(streams, post.shape[-1]).to(dtype)).sum(-2)
    return (mixed + post.to(dtype).mean(-1, keepdim=True) * branch.to(dtype)).to(streams.dtype)


def close_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `close` for `(streams, branch, post, res)`."""
    n = post.shape[-1]
    grads = (grad.to(reference.compute_dtype(streams)) / n).unsqueeze(-2).expand(*grad.shape[:-1], n, grad.shape[-1])
    d_wide, d_branch, d_post, d_res = reference.update_backward_fused(
        grads, spread(streams, n).to(grads.dtype), branch, post, res
    )
    return _gathered(d_wide, streams).to(streams.dtype), d_branch, d_post, d_res
