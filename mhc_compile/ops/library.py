"""Registers the `mhc::` operators: schemas, eager kernels, fake kernels and autograd.

    mhc::declare(phi, bias, scale) -> ()                          shows a tracer a site's parameters
    mhc::sinkhorn(logits, iterations) -> matrix
    mhc::coefficients(streams, phi, bias, scale, ...) -> (pre, post, res, z)
    mhc::collapse(streams, pre) -> h
    mhc::update(streams, branch, post, res) -> streams'

Semantics and shapes: `mhc_compile.ops.reference`. Each backward is an operator of its own
(`mhc::update_backward`), so that a compiler can lower it as it likes; it raises if it is
differentiated again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.errors import ShapeError
from mhc_compile.mappings import mapping_of
from mhc_compile.mappings.sinkhorn import sinkhorn, sinkhorn_backward
from mhc_compile.ops import cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """Return shape and dtype for errors."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_site(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float,
    *, n: int | None = None, name: str = "coefficients",
) -> None:  # fmt: skip
    """Check the tensors of a site that begins; with `n`, one stream may stand for n equal ones."""
    if streams.dim() < 3 or not streams.is_floating_point() or (n and streams.shape[-2] not in (1, n)):
        raise ShapeError(
            f"mhc::{name}: streams must be floating point [..., {f'{n} or 1' if n else 'n'}, C] with a token axis, got {shown(streams)}"
        )
    static = n is None and phi.shape[-1] == 0
    n, width = n or streams.shape[-2], streams.shape[-1]
    family = mapping_of(mapping)
    family.check(n)
    columns = 2 * n + family.logits(n)
    wanted = [n * width, 0 if static else columns], [columns], [0 if static else 3]
    if any(list(tensor.shape) != shape for tensor, shape in zip((phi, bias, scale), wanted, strict=True)):
        raise ShapeError(
            f"mhc::{name}: {n} streams {shown(streams)} and mapping {mapping!r} need phi {wanted[0]}, bias {wanted[1]} and"
            f" scale {wanted[2]}; got {shown(phi)}, {shown(bias)} and {shown(scale)}"
        )
    if any(tensor.device != streams.device for tensor in (phi, bias, scale)):
        raise ShapeError(
            f"mhc::{name}: streams on {streams.device} need phi, bias and scale there; got {phi.device}, {bias.device} and"
            f" {scale.device}. What is on the meta device has no values: load a checkpoint, or call to_empty(device=...)"
        )
    if iterations < 1:
        raise ShapeError(f"mhc::{name}: iterations must be at least 1, got {iterations}")


def check_mixing(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, name: str = "update") -> None:
    """Check the tensors of a site that ends; one stream may stand for n, but in `mhc::update`."""
    tokens, n, width = streams.shape[:-2], post.shape[-1], streams.shape[-1]
    held, form = ((n,), "") if name == "update" else ((1, n), " ([..., n or 1, C])")
    fits = branch.shape == (*tokens, width) and post.shape == (*tokens, n) and res.shape == (*tokens, n, n)
    if not fits or streams.shape[-2] not in held:
        raise ShapeError(
            f"mhc::{name}: streams {shown(streams)}{form} need branch [..., C], post [..., n] and res [..., n, n];"
            f" got {shown(branch)}, {shown(post)} and {shown(res)}"
        )


def _check_collapse(streams: Tensor, pre: Tensor) -> None:
    if pre.shape != streams.shape[:-1]:
        raise ShapeError(f"mhc::collapse: streams {shown(streams)} need pre [..., n], got {shown(pre)}")


_CHECKS: dict[str, Callable[..., None]] = {
    "coefficients": check_site,
    "collapse": _check_collapse,
    "update": check_mixing,
}


def checked(check: Callable[..., None] | None, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return `kernel` behind a check of its arguments."""

    def call(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return kernel(*args)

    return call


# --- kernels


def _by_name(name: str) -> Callable[..., Any]:
    # Looked up at each call, so that a changed reference changes the operator.
    return lambda *args: getattr(reference, name)(*args)


_KERNELS: dict[str, Callable[..., Any]] = {
    "sinkhorn": sinkhorn,
    "sinkhorn_backward": sinkhorn_backward,
    **{f"{name}{end}": _by_name(f"{name}{end}") for name in _CHECKS for end in ("", "_backward")},
}
for _name, _kernel in _KERNELS.items():
    LIBRARY.impl(_name, checked(_CHECKS.get(_name), reference.dense(_kernel)), "CompositeExplicitAutograd")
LIBRARY.impl("sinkhorn", cpu.sinkhorn, "CPU")
LIBRARY.impl("sinkhorn_backward", cpu.sinkhorn_backward, "CPU")
LIBRARY.impl("update", checked(check_mixing, cpu.OPERATORS["update"]), "CPU")
LIBRARY.impl("update_backward", cpu.OPERATORS["update_backward"], "CPU")
LIBRARY.impl("declare", lambda phi, bias, scale: None, "CompositeExplicitAutograd")


# --- fake kernels


def empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous tensor, by default of the shape of `like`, whatever its strides."""
    return torch.empty(shape or like.shape, dtype=dtype or like.dtype, device=like.device)


def _fake_coefficients(streams: Tensor, phi: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n = streams.shape[-2]
    shapes = ((n,), (n,), (n, n), (bias.shape[0],))
    dtype = reference.compute_dtype(streams)
    return tuple(empty(streams, *streams.shape[:-2], *shape, dtype=dtype) for shape in shapes)


_FAKES: dict[str, Callable[..., Any]] = {
    "declare": lambda phi, bias, scale: None,
    "sinkhorn": lambda logits, iterations, eps=0.0: empty(logits),
    "sinkhorn_backward": lambda grad, logits, iterations, eps=0.0: empty(logits),
    "coefficients": _fake_coefficients,
    "coefficients_backward": lambda *args: tuple(map(empty, args[4:8])),
    "collapse": lambda streams, pre: empty(streams, *streams.shape[:-2], streams.shape[-1]),
    "collapse_backward": lambda grad, *inputs: tuple(map(empty, inputs)),
    "update": lambda streams, *rest: empty(streams),
    "update_backward": lambda grad, *inputs: tuple(map(empty, inputs)),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"mhc::{_name}", checked(_CHECKS.get(_name), _fake), lib=LIBRARY)


# --- autograd


def register_autograd(
    name: str, *, saved: tuple[int, ...] = (), differentiable: tuple[int, ...] | None = None, moments: int | None = None
) -> None:
    """Register `mhc::NAME_backward` as the backward of `mhc::NAME`, and an error as its own.

    It gets the gradients of the outputs, the tensors that went in, outputs, and the settings.

    Args:
        name: of the operator.
        saved: positions of the outputs that the backward gets.
        differentiable: positions of the outputs that have a gradient, which may be None; None for
            all outputs, with zeros for those that are not used.
        moments: position of the moments of an operator that takes a norm, whose last arguments are
            `norm, gain, shift, norm_eps, read_dtype`.
    """
    backward_of = getattr(torch.ops.mhc, f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        end = len(inputs) if moments is None else len(inputs) - 5
        tensors = [value for value in inputs[:end] if isinstance(value, Tensor)]
        ctx.settings, norm = inputs[len(tensors) : end], inputs[end:]
        last = (*norm[1:3], output[moments]) if norm and norm[0] else (None, None, None)
        ctx.norm, ctx.count = norm[:1], len(tensors)
        ctx.save_for_backward(*tensors, *(output[i] for i in saved), *(last if norm else ()))
        if differentiable is not None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(out for i, out in enumerate(output) if i not in differentiable))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        used = grads if differentiable is None else [grads[i] for i in differentiable]
        settings = ctx.settings[-3:]  # without the n of mhc::read, which the coefficients show
        saved_tensors = ctx.saved_tensors  # once: checkpointing allows no second time
        end = len(saved_tensors) - 3 * len(ctx.norm)
        tensors, last = saved_tensors[:end], saved_tensors[end:]
        got = backward_of(*used, *tensors, *settings, *ctx.norm, *last)
        got = got if isinstance(got, tuple) else (got,)
        nothing = (None,) * len(ctx.settings)
        if not ctx.norm:
            return *got, *nothing
        d_gain, d_shift = (None if like is None else grad for like, grad in zip(last[:2], got[-2:], strict=True))
        return *got[: ctx.count], *nothing, None, d_gain, d_shift, None, None

    def once_only(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"mhc::{name}_backward is not differentiable: second derivatives (create_graph=True) are not supported"
            " through hyper-connections"
        )

    torch.library.register_autograd(f"mhc::{name}", backward, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(f"mhc::{name}_backward", once_only, lib=LIBRARY)


register_autograd("sinkhorn")
register_autograd("coefficients", saved=(0, 1, 3))
register_autograd("collapse")
register_autograd("update")
