"""Registers the fused operators: schemas, kernels, fake kernels and autograd.

    mhc::read(streams, phi, bias, scale, n, ...) -> (h, pre, post, res, z, inverse, moments)
    mhc::step(streams, branch, post, res, phi, bias, scale, ...)
        -> (streams', h', pre', post', res', z', inverse', moments')
    mhc::shifted_step(streams, branch, post, res, pre, phi, bias, scale, ...) -> (the same)
    mhc::mix_read(streams, branch, post, res, pre) -> (streams', h', moments')
    mhc::close(streams, branch, post, res) -> mean

All but the last may compute the norm of h as well, and write it in another dtype than that of the
streams: `..., norm, gain, shift, norm_eps, read_dtype)`.

Semantics and shapes: `mhc_compile.ops.fused_reference`. `passes.FuseSites` writes them, and
`passes.FuseNorms` the norms; models and exported programs have only the operators of
`mhc_compile.ops.library`. The backward gets the old streams and the coefficients, never the new
streams. `pre`, `z`, `inverse` and `moments` are results that only the backward reads: they have no
gradient. In `shifted_step` h is read with the `pre` that goes in, so that the one that comes out is
a result like `post`.
"""

from __future__ import annotations

import functools
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.errors import ShapeError
from mhc_compile.ops import cpu, lazy_reference, reference
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops.library import LIBRARY, check_mixing, check_site, checked, empty, register_autograd, shown
from mhc_compile.ops.norm_reference import NORMS, bound, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable


def is_fused(mapping: str) -> bool:
    """Return whether the fused operators compute this convention.

    The others keep the operators of `mhc_compile.ops.library`.
    """
    convention = parse(mapping)
    return convention.mapping in cpu.MAPPINGS and not convention.rank


_SITE = "Tensor phi, Tensor bias, Tensor scale"
_HOW = "str mapping, int iterations, float eps"
_READ = "Tensor h, Tensor pre, Tensor post, Tensor res, Tensor z, Tensor inverse, Tensor moments"
_NEXT = "Tensor h, Tensor next_pre, Tensor next_post, Tensor next_res, Tensor z, Tensor inverse, Tensor moments"
#: What asks for a norm of h, and another dtype; without it there is none.
NORM = "str norm='', Tensor? gain=None, Tensor? shift=None, float norm_eps=0.0, ScalarType? read_dtype=None"
NORM_BACKWARD = "str norm='', Tensor? gain=None, Tensor? shift=None, Tensor? moments=None"
_OLD = "Tensor streams, Tensor branch, Tensor post, Tensor res"
_GRADS = "Tensor? grad_h, Tensor? grad_post, Tensor? grad_res"


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


_SCHEMAS = (
    f"read(Tensor streams, {_SITE}, int n, {_HOW}, {NORM}) -> ({_READ})",
    f"read_backward({_GRADS}, Tensor streams, {_SITE}, Tensor pre, Tensor post, Tensor z, Tensor inverse, {_HOW},"
    f" {NORM_BACKWARD}) -> ({_tensors(6)})",
    f"step({_OLD}, {_SITE}, {_HOW}, {NORM}) -> (Tensor streams_out, {_NEXT})",
    f"step_backward(Tensor? grad_streams, {_GRADS}, {_OLD}, {_SITE}, Tensor next_pre, Tensor next_post, Tensor z,"
    f" Tensor inverse, {_HOW}, {NORM_BACKWARD}) -> ({_tensors(9)})",
    f"shifted_step({_OLD}, Tensor pre, {_SITE}, {_HOW}, {NORM}) -> (Tensor streams_out, {_NEXT})",
    f"shifted_step_backward(Tensor? grad_streams, Tensor? grad_h, Tensor? grad_pre, Tensor? grad_post, Tensor? grad_res,"
    f" {_OLD}, Tensor pre, {_SITE}, Tensor next_pre, Tensor next_post, Tensor z, Tensor inverse, {_HOW},"
    f" {NORM_BACKWARD}) -> ({_tensors(10)})",
    f"mix_read({_OLD}, Tensor pre, {NORM}) -> (Tensor streams_out, Tensor h, Tensor moments)",
    f"mix_read_backward(Tensor? grad_streams, Tensor? grad_h, {_OLD}, Tensor pre, {NORM_BACKWARD}) -> ({_tensors(7)})",
    f"close({_OLD}) -> Tensor",
    f"close_backward(Tensor grad, {_OLD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def check_read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float,
    *norm: Any, name: str = "read",
) -> None:  # fmt: skip
    """Check the tensors of a site that begins, and that its convention has fused operators."""
    _check_norm(name, streams, *norm)
    if not is_fused(mapping):
        raise ShapeError(
            f"mhc::{name}: mapping {mapping!r} has no fused operator; those that have: {', '.join(cpu.MAPPINGS)}"
        )
    check_site(streams, phi, bias, scale, mapping, iterations, eps, n=n, name=name)


def _check_norm(
    name: str, streams: Tensor, norm: str = "", gain: Tensor | None = None, shift: Tensor | None = None, *_: Any
) -> None:
    given = [tensor for tensor in (gain, shift) if tensor is not None]
    width = streams.shape[-1]
    if norm not in NORMS or (given and not norm) or any(tensor.shape != (width,) for tensor in given):
        raise ShapeError(
            f"mhc::{name}: norm must be one of {', '.join(map(repr, NORMS))}, with gain and shift [{width}] or none;"
            f" got {norm!r} with {' and '.join(map(shown, given)) or 'none'}"
        )


def _check_step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, *settings: Any
) -> None:
    check_mixing(streams, branch, post, res, name="step")
    check_read(streams, phi, bias, scale, post.shape[-1], *settings, name="step")


def _check_mix_read(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor, *norm: Any, name: str = "mix_read"
) -> None:
    check_mixing(streams, branch, post, res, name=name)
    if pre.shape != post.shape:
        raise ShapeError(f"mhc::{name}: post {shown(post)} needs pre of its shape, got {shown(pre)}")
    _check_norm(name, streams, *norm)


def _check_shifted_step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, pre: Tensor, phi: Tensor, bias: Tensor, scale: Tensor,
    *settings: Any,
) -> None:  # fmt: skip
    _check_mix_read(streams, branch, post, res, pre, name="shifted_step")
    check_read(streams, phi, bias, scale, post.shape[-1], *settings, name="shifted_step")


_CHECKS: dict[str, Callable[..., None]] = {
    "read": check_read,
    "step": _check_step,
    "shifted_step": _check_shifted_step,
    "mix_read": _check_mix_read,
    "close": functools.partial(check_mixing, name="close"),
}
_NAMES = [f"{name}{end}" for name in _CHECKS for end in ("", "_backward")]


# --- kernels


def on_cuda(name: str) -> Callable[..., Any]:
    """Return the Triton kernel of an operator, which falls back to the composition.

    The composition runs for dtypes and mappings that have no kernel, and where none runs on the
    device (`triton.reason`). Triton is imported when the first CUDA tensor comes. Not yet run on a
    GPU.
    """
    module = reference if name.startswith("update") else lazy_reference if name.startswith("lazy") else fused
    composed = getattr(module, name)

    def call(*args: Any) -> Any:
        from mhc_compile.ops import triton

        given = bound(composed, args)
        lists = [argument if isinstance(argument, list) else [argument] for argument in args]
        tensors = [one for one in chain.from_iterable(lists) if isinstance(one, Tensor)]
        there_is = triton.reason(tensors[0].device) is None
        there_is = there_is and all(triton.takes(tensor.dtype, mapping=given.get("mapping")) for tensor in tensors)
        return (getattr(triton, name) if there_is else reference.dense(composed))(*args)

    return call


for _name in _NAMES:
    _check = _CHECKS.get(_name)
    LIBRARY.impl(_name, checked(_check, reference.dense(getattr(fused, _name))), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, checked(_check, cpu.OPERATORS[_name]), "CPU")
    LIBRARY.impl(_name, checked(_check, on_cuda(_name)), "CUDA")
LIBRARY.impl("update_backward", on_cuda("update_backward"), "CUDA")


# --- fake kernels


def _fake(name: str) -> Callable[..., Any]:
    composed = getattr(fused, name)
    forward = getattr(fused, name.removesuffix("_backward"))

    def results(*args: Any) -> Any:
        given = bound(composed, args)
        if name.endswith("_backward"):
            likes = (given[key] for key in tensors_of(forward))
            return tuple(given["streams"].new_empty(0) if like is None else empty(like) for like in likes)
        n = given["n"] if "n" in given else given["post"].shape[-1]
        found = fused.empty_results(
            name, given["streams"], n, given.get("phi"), given.get("norm", ""), given.get("read_dtype")
        )
        return tuple(found) if len(found) > 1 else found[0]

    return results


for _name in _NAMES:
    torch.library.register_fake(f"mhc::{_name}", checked(_CHECKS.get(_name), _fake(_name)), lib=LIBRARY)


register_autograd("read", saved=(1, 2, 4, 5), differentiable=(0, 2, 3), moments=6)
register_autograd("step", saved=(2, 3, 5, 6), differentiable=(0, 1, 3, 4), moments=7)
register_autograd("shifted_step", saved=(2, 3, 5, 6), differentiable=(0, 1, 2, 3, 4), moments=7)
register_autograd("mix_read", differentiable=(0, 1), moments=2)
register_autograd("close")
