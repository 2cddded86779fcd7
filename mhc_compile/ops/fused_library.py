"""Registers the fused operators: schemas, kernels, fake kernels and autograd.

    mhc::read(streams, phi, bias, scale, n, ...) -> (h, pre, post, res, z, inverse)
    mhc::step(streams, branch, post, res, phi, bias, scale, ...) -> (streams', h', pre', post', res', z', inverse')
    mhc::close(streams, branch, post, res) -> mean

Semantics and shapes: `mhc_compile.ops.fused_reference`. `passes.FuseSites` writes them; models and exported programs know only the operators of
`mhc_compile.ops.library`. For the backward they keep the old streams and the coefficients, never the new streams. `pre`, `z` and `inverse` are
results that only the backward reads: they have no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.errors import ShapeError
from mhc_compile.mappings import mapping_of
from mhc_compile.ops import cpu, reference
from mhc_compile.ops import fused_reference as fused
from mhc_compile.ops.library import LIBRARY, dense, once_only, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["is_fused"]


def is_fused(mapping: str) -> bool:
    """Whether the fused operators compute this mapping or convention. The others keep the operators of `mhc_compile.ops.library`."""
    convention = parse(mapping)
    return convention.mapping in cpu.MAPPINGS and not convention.rank


_SITE = "Tensor phi, Tensor bias, Tensor scale"
_HOW = "str mapping, int iterations, float eps"
_READ = "Tensor h, Tensor pre, Tensor post, Tensor res, Tensor z, Tensor inverse"
_NEXT = "Tensor h, Tensor next_pre, Tensor next_post, Tensor next_res, Tensor z, Tensor inverse"
_OLD = "Tensor streams, Tensor branch, Tensor post, Tensor res"
_GRADS = "Tensor? grad_h, Tensor? grad_post, Tensor? grad_res"
_SCHEMAS = (
    f"read(Tensor streams, {_SITE}, int n, {_HOW}) -> ({_READ})",
    f"read_backward({_GRADS}, Tensor streams, {_SITE}, Tensor pre, Tensor post, Tensor z, Tensor inverse, {_HOW})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"step({_OLD}, {_SITE}, {_HOW}) -> (Tensor streams_out, {_NEXT})",
    f"step_backward(Tensor? grad_streams, {_GRADS}, {_OLD}, {_SITE}, Tensor next_pre, Tensor next_post, Tensor z, Tensor inverse, {_HOW})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"close({_OLD}) -> Tensor",
    f"close_backward(Tensor grad, {_OLD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def _check_site(
    name: str, streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int
) -> None:
    if not is_fused(mapping):
        raise ShapeError(
            f"mhc::{name}: mapping {mapping!r} has no fused operator; those that have: {', '.join(cpu.MAPPINGS)}"
        )
    family = mapping_of(mapping)
    family.check(n)
    columns = 2 * n + family.logits(n)
    if streams.dim() < 3 or not streams.is_floating_point() or streams.shape[-2] not in (1, n):
        raise ShapeError(
            f"mhc::{name}: streams must be floating point [..., {n} or 1, C] with a token axis, got {shown(streams)}"
        )
    if (
        tuple(phi.shape) != (n * streams.shape[-1], columns)
        or tuple(bias.shape) != (columns,)
        or tuple(scale.shape) != (3,)
    ):
        raise ShapeError(
            f"mhc::{name}: {n} streams {shown(streams)} and mapping {mapping!r} need phi [{n * streams.shape[-1]}, {columns}], bias [{columns}] and"
            f" scale [3]; got {shown(phi)}, {shown(bias)} and {shown(scale)}"
        )
    if iterations < 1:
        raise ShapeError(f"mhc::{name}: iterations must be at least 1, got {iterations}")


def _check_old(name: str, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> None:
    tokens, n, width = streams.shape[:-2], post.shape[-1], streams.shape[-1]
    fits = branch.shape == (*tokens, width) and post.shape == (*tokens, n) and res.shape == (*tokens, n, n)
    if not fits or streams.shape[-2] not in (1, n):
        raise ShapeError(
            f"mhc::{name}: streams {shown(streams)} ([..., n or 1, C]) need branch [..., C], post [..., n] and res [..., n, n];"
            f" got {shown(branch)}, {shown(post)} and {shown(res)}"
        )


# --- kernels ---------------------------------------------------------------------------------------------------------------------------


def _checked(kernels: Any) -> dict[str, Callable[..., Any]]:
    """The forward kernels of a module behind the checks, and its backward kernels, which get what the forward was given."""

    def read(
        streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
    ) -> Any:
        _check_site("read", streams, phi, bias, scale, n, mapping, iterations)
        return kernels.read(streams, phi, bias, scale, n, mapping, iterations, eps)

    def step(
        streams: Tensor,
        branch: Tensor,
        post: Tensor,
        res: Tensor,
        phi: Tensor,
        bias: Tensor,
        scale: Tensor,
        mapping: str,
        iterations: int,
        eps: float,
    ) -> Any:
        _check_old("step", streams, branch, post, res)
        _check_site("step", streams, phi, bias, scale, post.shape[-1], mapping, iterations)
        return kernels.step(streams, branch, post, res, phi, bias, scale, mapping, iterations, eps)

    def close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Any:
        _check_old("close", streams, branch, post, res)
        return kernels.close(streams, branch, post, res)

    backwards = {f"{name}_backward": getattr(kernels, f"{name}_backward") for name in ("read", "step", "close")}
    return {"read": read, "step": step, "close": close, **backwards}


for _name, _kernel in _checked(fused).items():
    LIBRARY.impl(_name, dense(_kernel), "CompositeExplicitAutograd")
for _name, _kernel in _checked(cpu).items():
    LIBRARY.impl(_name, _kernel, "CPU")


def on_cuda(name: str) -> Callable[..., Any]:
    """The Triton kernel of an operator; the composition for dtypes and mappings that it does not take, and where Triton is not installed.

    Triton is imported when the first CUDA tensor comes. Not yet run on a GPU.
    """
    composed = getattr(reference if name.startswith("update") else fused, name)

    def call(*args: Any) -> Any:
        from mhc_compile.ops import triton

        dtypes = [argument.dtype for argument in args if isinstance(argument, torch.Tensor)]
        mapping = next((argument for argument in args if isinstance(argument, str)), None)
        there_is = all(triton.takes(dtype, mapping=mapping) for dtype in dtypes)
        return (getattr(triton, name) if there_is else dense(composed))(*args)

    return call


class _OnCuda:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        return on_cuda(name)


for _name, _kernel in _checked(_OnCuda()).items():
    LIBRARY.impl(_name, _kernel, "CUDA")
LIBRARY.impl("update_backward", on_cuda("update_backward"), "CUDA")


# --- fake kernels ----------------------------------------------------------------------------------------------------------------------


def _new(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, whatever the strides of the originals: so the kernels allocate them."""
    return tuple(_new(tensor, *tensor.shape) for tensor in tensors)


def _fake_read(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, n: int, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    _check_site("read", streams, phi, bias, scale, n, mapping, iterations)
    tokens, dtype = streams.shape[:-2], reference.compute_dtype(streams)
    shapes = ((n,), (n,), (n, n), (phi.shape[-1],), (1,))
    return _new(streams, *tokens, streams.shape[-1]), *(_new(streams, *tokens, *shape, dtype=dtype) for shape in shapes)


def _fake_step(
    streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, *how: Any
) -> tuple[Tensor, ...]:
    _check_old("step", streams, branch, post, res)
    n = post.shape[-1]
    after = _new(streams, *streams.shape[:-2], n, streams.shape[-1])
    return after, *_fake_read(after, phi, bias, scale, n, *how)


def _fake_close(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    _check_old("close", streams, branch, post, res)
    return _new(streams, *streams.shape[:-2], streams.shape[-1])


_FAKES: dict[str, Callable[..., Any]] = {
    "read": _fake_read,
    "read_backward": lambda grad_h, grad_post, grad_res, streams, phi, bias, scale, *rest: _like(
        streams, phi, bias, scale
    ),
    "step": _fake_step,
    "step_backward": lambda g, gh, gp, gr, streams, branch, post, res, phi, bias, scale, *rest: _like(
        streams, branch, post, res, phi, bias, scale
    ),
    "close": _fake_close,
    "close_backward": lambda grad, *old: _like(*old),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"mhc::{_name}", _fake, lib=LIBRARY)


# --- autograd --------------------------------------------------------------------------------------------------------------------------


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, phi, bias, scale, _, *ctx.how = inputs
    _, pre, post, _, z, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre, z, inverse)
    ctx.save_for_backward(streams, phi, bias, scale, pre, post, z, inverse)


def _read_vjp(ctx: Any, grad_h: Any, grad_pre: Any, grad_post: Any, grad_res: Any, *rest: Any) -> tuple[Any, ...]:
    grads = torch.ops.mhc.read_backward(grad_h, grad_post, grad_res, *ctx.saved_tensors, *ctx.how)
    return *grads, None, None, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mapping, ctx.iterations, ctx.eps = inputs
    _, _, pre, post, _, z, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre, z, inverse)
    ctx.save_for_backward(*tensors, pre, post, z, inverse)


def _step_vjp(
    ctx: Any, grad_streams: Any, grad_h: Any, grad_pre: Any, grad_post: Any, grad_res: Any, *rest: Any
) -> tuple[Any, ...]:
    how = (ctx.mapping, ctx.iterations, ctx.eps)
    grads = torch.ops.mhc.step_backward(grad_streams, grad_h, grad_post, grad_res, *ctx.saved_tensors, *how)
    return *grads, None, None, None


def _save_close(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _close_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.mhc.close_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


torch.library.register_autograd("mhc::read", _read_vjp, setup_context=_save_read, lib=LIBRARY)
torch.library.register_autograd("mhc::step", _step_vjp, setup_context=_save_step, lib=LIBRARY)
torch.library.register_autograd("mhc::close", _close_vjp, setup_context=_save_close, lib=LIBRARY)
for _name in ("read", "step", "close"):
    torch.library.register_autograd(f"mhc::{_name}_backward", once_only(f"{_name}_backward"), lib=LIBRARY)
