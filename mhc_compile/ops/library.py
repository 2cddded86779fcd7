"""Registers the `mhc::` operators: schemas, eager kernels, fake kernels and autograd.

    mhc::declare(phi, bias, scale) -> ()                                    tells a tracer that a site's parameters exist
    mhc::sinkhorn(logits, iterations) -> matrix                             (and mhc::sinkhorn_backward)
    mhc::coefficients(streams, phi, bias, scale, ...) -> (pre, post, res, z)  (and mhc::coefficients_backward)
    mhc::collapse(streams, pre) -> h                                        (and mhc::collapse_backward)
    mhc::update(streams, branch, post, res) -> streams'                     (and mhc::update_backward)

Semantics and shapes: `mhc_compile.ops.reference`. Backwards are operators of their own, so that a compiler can lower each as it likes; they
are not differentiable again, and say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.errors import ShapeError
from mhc_compile.mappings import mapping_of
from mhc_compile.mappings.sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.ops import cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["LIBRARY", "dense", "once_only", "shown"]

LIBRARY = torch.library.Library("mhc", "DEF")

_SCHEMAS = (
    "declare(Tensor phi, Tensor bias, Tensor scale) -> ()",
    "sinkhorn(Tensor logits, int iterations, float eps=0.0) -> Tensor",
    "sinkhorn_backward(Tensor grad, Tensor logits, int iterations, float eps=0.0) -> Tensor",
    "coefficients(Tensor streams, Tensor phi, Tensor bias, Tensor scale, str mapping, int iterations, float eps)"
    " -> (Tensor pre, Tensor post, Tensor res, Tensor z)",
    "coefficients_backward(Tensor grad_pre, Tensor grad_post, Tensor grad_res, Tensor grad_z, Tensor streams, Tensor phi,"
    " Tensor bias, Tensor scale, Tensor pre, Tensor post, Tensor z, str mapping, int iterations, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "collapse(Tensor streams, Tensor pre) -> Tensor",
    "collapse_backward(Tensor grad, Tensor streams, Tensor pre) -> (Tensor, Tensor)",
    "update(Tensor streams, Tensor branch, Tensor post, Tensor res) -> Tensor",
    "update_backward(Tensor grad, Tensor streams, Tensor branch, Tensor post, Tensor res)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def shown(tensor: Tensor) -> str:
    """Shape and dtype, for errors."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int
) -> None:
    if streams.dim() < 3 or not streams.is_floating_point():
        raise ShapeError(
            f"mhc::coefficients: streams must be floating point [..., n, C] with a token axis, got {shown(streams)}"
        )
    n, width = streams.shape[-2:]
    family = mapping_of(mapping)
    family.check(n)
    columns = 2 * n + family.logits(n)
    static = phi.shape[-1] == 0
    if tuple(phi.shape) != (n * width, 0 if static else columns):
        raise ShapeError(
            f"mhc::coefficients: phi is {shown(phi)}; streams {shown(streams)} and mapping {mapping!r} need [{n * width}, {columns}]"
        )
    if tuple(bias.shape) != (columns,) or tuple(scale.shape) != (0 if static else 3,):
        raise ShapeError(
            f"mhc::coefficients: bias must be [{columns}] and scale [{0 if static else 3}], got {shown(bias)} and {shown(scale)}"
        )
    if iterations < 1:
        raise ShapeError(f"mhc::coefficients: iterations must be at least 1, got {iterations}")


def _check_update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> None:
    tokens, n, width = streams.shape[:-2], streams.shape[-2], streams.shape[-1]
    if branch.shape != (*tokens, width) or post.shape != (*tokens, n) or res.shape != (*tokens, n, n):
        raise ShapeError(
            f"mhc::update: streams {shown(streams)} need branch [..., C], post [..., n] and res [..., n, n];"
            f" got {shown(branch)}, {shown(post)} and {shown(res)}"
        )


def _check_collapse(streams: Tensor, pre: Tensor) -> None:
    if pre.shape != streams.shape[:-1]:
        raise ShapeError(f"mhc::collapse: streams {shown(streams)} need pre [..., n], got {shown(pre)}")


# --- kernels ---------------------------------------------------------------------------------------------------------------------------


def _coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    _check_coefficients(streams, phi, bias, scale, mapping, iterations)
    return reference.coefficients(streams, phi, bias, scale, mapping, iterations, eps)


def _collapse(streams: Tensor, pre: Tensor) -> Tensor:
    _check_collapse(streams, pre)
    return reference.collapse(streams, pre)


def _update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    _check_update(streams, branch, post, res)
    return reference.update(streams, branch, post, res)


def dense(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Makes every output contiguous, as the fake kernels promise."""

    def call(*args: Any) -> Any:
        out = kernel(*args)
        return tuple(map(torch.Tensor.contiguous, out)) if isinstance(out, tuple) else out.contiguous()

    return call


def _on_cpu(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
        _check_update(streams, branch, post, res)
        return kernel(streams, branch, post, res)

    return update


_KERNELS: dict[str, Callable[..., Any]] = {
    "sinkhorn": sinkhorn,
    "sinkhorn_backward": sinkhorn_backward,
    "coefficients": _coefficients,
    "coefficients_backward": reference.coefficients_backward,
    "collapse": _collapse,
    "collapse_backward": reference.collapse_backward,
    "update": _update,
    "update_backward": reference.update_backward,
}
for _name, _kernel in _KERNELS.items():
    LIBRARY.impl(_name, dense(_kernel), "CompositeExplicitAutograd")
LIBRARY.impl("sinkhorn", cpu.sinkhorn, "CPU")
LIBRARY.impl("sinkhorn_backward", cpu.sinkhorn_backward, "CPU")
LIBRARY.impl("update", _on_cpu(cpu.update), "CPU")
LIBRARY.impl("update_backward", cpu.update_backward, "CPU")
LIBRARY.impl("declare", lambda phi, bias, scale: None, "CompositeExplicitAutograd")


# --- fake kernels ----------------------------------------------------------------------------------------------------------------------
# Outputs are contiguous, whatever the strides of the inputs: the kernels allocate them so.


def _empty(like: Tensor, shape: tuple[Any, ...] | torch.Size | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape if shape is None else shape, dtype=dtype or like.dtype, device=like.device)


def _fake_coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    _check_coefficients(streams, phi, bias, scale, mapping, iterations)
    tokens, n, dtype = streams.shape[:-2], streams.shape[-2], reference.compute_dtype(streams)
    shapes = ((*tokens, n), (*tokens, n), (*tokens, n, n), (*tokens, bias.shape[0]))
    return tuple(_empty(streams, shape, dtype) for shape in shapes)


def _fake_coefficients_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    grad_z: Tensor,
    streams: Tensor,
    phi: Tensor,
    bias: Tensor,
    scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _empty(streams), _empty(phi), _empty(bias), _empty(scale)


def _fake_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    _check_collapse(streams, pre)
    return _empty(streams, (*streams.shape[:-2], streams.shape[-1]))


def _fake_update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    _check_update(streams, branch, post, res)
    return _empty(streams)


_FAKES: dict[str, Callable[..., Any]] = {
    "declare": lambda phi, bias, scale: None,
    "sinkhorn": lambda logits, iterations, eps=0.0: _empty(logits),
    "sinkhorn_backward": lambda grad, logits, iterations, eps=0.0: _empty(logits),
    "coefficients": _fake_coefficients,
    "coefficients_backward": _fake_coefficients_backward,
    "collapse": _fake_collapse,
    "collapse_backward": lambda grad, streams, pre: (_empty(streams), _empty(pre)),
    "update": _fake_update,
    "update_backward": lambda grad, streams, branch, post, res: tuple(map(_empty, (streams, branch, post, res))),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"mhc::{_name}", _fake, lib=LIBRARY)


# --- autograd --------------------------------------------------------------------------------------------------------------------------


def _save_sinkhorn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return torch.ops.mhc.sinkhorn_backward(grad, logits, ctx.iterations, ctx.eps), None, None


def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, phi, bias, scale, *ctx.static = inputs
    pre, post, _, z = output
    ctx.save_for_backward(streams, phi, bias, scale, pre, post, z)


def _coefficients_vjp(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *torch.ops.mhc.coefficients_backward(*grads, *ctx.saved_tensors, *ctx.static), None, None, None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _collapse_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.mhc.collapse_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


def _update_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.mhc.update_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


def once_only(name: str) -> Callable[..., Any]:
    """The backward of a backward: an error that says so."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"mhc::{name} is not differentiable: second derivatives (create_graph=True) are not supported through hyper-connections"
        )

    return backward


torch.library.register_autograd("mhc::sinkhorn", _sinkhorn_vjp, setup_context=_save_sinkhorn, lib=LIBRARY)
torch.library.register_autograd("mhc::coefficients", _coefficients_vjp, setup_context=_save_coefficients, lib=LIBRARY)
torch.library.register_autograd("mhc::collapse", _collapse_vjp, setup_context=_save_inputs, lib=LIBRARY)
torch.library.register_autograd("mhc::update", _update_vjp, setup_context=_save_inputs, lib=LIBRARY)
for _name in ("sinkhorn", "coefficients", "collapse", "update"):
    torch.library.register_autograd(f"mhc::{_name}_backward", once_only(f"{_name}_backward"), lib=LIBRARY)
