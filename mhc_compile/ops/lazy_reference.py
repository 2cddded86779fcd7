"""Steps of streams that are not in memory, as compositions.

The streams after k sites are a linear combination, for each token, of the streams X_0 that were
written last and of the outputs y_1 ... y_k of the branches since:

    X_k = res_k X_(k-1) + post_k y_k = A_k X_0 + B_k [y_1 ... y_k]
    A_k = res_k A_(k-1),   B_k = [res_k B_(k-1) | post_k],   A_0 = 1

A kernel reads X_0 and the outputs (n + k rows), which are kept for the backward anyway, instead of
X_(k-1) and y_k (n + 1 rows), and writes h alone: the n rows of X_k need neither be written nor
kept. `streams` [..., m, C] are X_0, with m = n, or m = 1 for n equal streams. `branches` [..., C],
`post` [..., n] and `res` [..., n, n] are lists, of the k sites that have ended since.

`mhc_compile.ops.cpu` is tested against these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops import reference
from mhc_compile.ops.norm_reference import bound, normed, normed_backward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    Tensors = Sequence[Tensor]

#: From how many sites a kernel takes its streams, by device. On CUDA a fourth would cost registers,
#: and move more bytes: n (n + 1) / L for writing, (L + 1) / 2 for reading branches.
LONGEST = {"cpu": 4, "cuda": 3}


def _updated(streams: Tensor, branches: Tensors, post: Tensors, res: Tensors) -> Tensor:
    """Return the streams after these sites: [..., n, C], or `streams` for none."""
    for branch, one_post, one_res in zip(branches, post, res, strict=True):
        streams = reference.update_fused(fused.spread(streams, one_post.shape[-1]), branch, one_post, one_res)
    return streams


def _before(streams: Tensor, branches: Tensors, post: Tensors, res: Tensors) -> Tensor:
    """Return the streams before the last of the sites."""
    return _updated(streams, branches[:-1], post[:-1], res[:-1])


def _old_h(given: Mapping[str, Any]) -> Tensor:
    """Return h again, from the arguments of a backward by name."""
    after = _updated(*(given[key] for key in ("streams", "branches", "post", "res")))
    return reference.collapse_fused(after, given["next_pre"])


@normed(at=1)
def lazy_step(
    streams: Tensor, branches: Tensors, post: Tensors, res: Tensors,
    phi: Tensor, bias: Tensor, scale: Tensor, write: bool, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return `fused_reference.step` of the last site; its streams are [0] unless `write`."""
    old = _before(streams, branches, post, res)
    last = branches[-1], post[-1], res[-1]
    after, *rest, _ = fused.step(old, *last, phi, bias, scale, mapping, iterations, eps)
    return after if write else after.new_empty(0), *rest


@normed_backward(_old_h)
def lazy_step_backward(
    grad_streams: Tensor | None, grad_h: Tensor | None, grad_post: Tensor | None, grad_res: Tensor | None,
    streams: Tensor, branches: Tensors, post: Tensors, res: Tensors, phi: Tensor, bias: Tensor, scale: Tensor,
    next_pre: Tensor, next_post: Tensor, z: Tensor, inverse: Tensor, mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return `fused_reference.step_backward` of the last of two or more sites.

    The gradient of its old streams is [..., n, C]. It contains all that later sites give to earlier
    branches: each branch gets its gradient from the step that ends its own site.
    """
    old = _before(streams, branches, post, res), branches[-1], post[-1], res[-1]
    grads, site, saved = (
        (grad_streams, grad_h, grad_post, grad_res),
        (phi, bias, scale),
        (next_pre, next_post, z, inverse),
    )
    found: tuple[Tensor, ...] = fused.step_backward(*grads, *old, *site, *saved, mapping, iterations, eps)
    return found[:7]


def lazy_close(streams: Tensor, branches: Tensors, post: Tensors, res: Tensors) -> Tensor:
    """Return `fused_reference.close` of the last site."""
    return fused.close(_before(streams, branches, post, res), branches[-1], post[-1], res[-1])


def lazy_close_backward(
    grad: Tensor, streams: Tensor, branches: Tensors, post: Tensors, res: Tensors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `fused_reference.close_backward` of the last of two or more sites."""
    return fused.close_backward(grad, _before(streams, branches, post, res), branches[-1], post[-1], res[-1])


def by_name(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of an operator by the names of its parameters."""
    return bound(globals()[name], args)


def differentiated(name: str, given: Mapping[str, Any]) -> list[Tensor | None]:
    """Return the tensors whose gradients a backward returns; its streams are [..., n, C]."""
    last = (given[key][-1] for key in ("branches", "post", "res"))
    site = ("phi", "bias", "scale", "gain", "shift") if name == "lazy_step_backward" else ()
    return [given["streams"], *last, *(given[key] for key in site)]


def empty_outputs(name: str, given: Mapping[str, Any]) -> list[Tensor]:
    """Return new tensors for the results of an operator from its arguments by name, contiguous."""
    streams, n = given["streams"], given["post"][-1].shape[-1]
    if name == "lazy_close":
        return fused.empty_results("close", streams, n)
    unwritten = name == "lazy_step" and not given["write"]
    wide = streams.new_empty(0 if unwritten else (*streams.shape[:-2], n, streams.shape[-1]))
    if name == "lazy_step":
        return [wide, *fused.empty_results("read", streams, n, given["phi"], given["norm"], given["read_dtype"])]
    return [
        wide,
        *(streams.new_empty(0) if one is None else one.new_empty(one.shape) for one in differentiated(name, given)[1:]),
    ]
