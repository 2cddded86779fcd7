"""The norm of a branch's input h, which the operator that reads h computes too, as compositions.

    rms    h' = gain · h / sqrt(mean(h²) + eps)
    layer  h' = gain · (h − mean(h)) / sqrt(var(h) + eps) + shift

`gain` and `shift` [C] may be absent. An operator with a norm returns h' [..., C] instead of h and,
as its last result, `moments` [..., 2]: the mean that was subtracted (0 for rms), and the factor.
Its backward computes h again from the streams: neither h nor its gradient is ever written.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

#: The kinds, by the value of `norm`; kernels know them by their position.
NORMS = ("", "rms", "layer")
_SETTINGS = {"norm": "", "gain": None, "shift": None}


def normalize(h: Tensor, norm: str, gain: Tensor | None, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(h', moments)`, h' [..., C] in the dtype of h."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True) if norm == "layer" else torch.zeros_like(wide[..., :1])
    factor = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    out = (wide - mean) * factor
    out = out if gain is None else out * gain
    out = out if shift is None else out + shift
    return out.to(h.dtype), torch.cat([mean, factor], -1)


def normalize_backward(
    grad: Tensor, h: Tensor, moments: Tensor, norm: str, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize` for h, gain and shift.

    With u = gain · grad and x = (h − mean) factor: `dh = factor (u − mean(u) − x mean(u x))`,
    without `mean(u)` for rms; `dgain = Σ grad · x` and `dshift = Σ grad` over all tokens.
    """
    mean, factor = moments.unbind(-1)
    g, x = grad.to(moments.dtype), (h.to(moments.dtype) - mean.unsqueeze(-1)) * factor.unsqueeze(-1)
    u = g if gain is None else g * gain
    d_h = u - x * (u * x).mean(-1, keepdim=True)
    d_h = d_h - u.mean(-1, keepdim=True) if norm == "layer" else d_h
    tokens = tuple(range(g.dim() - 1))
    return (factor.unsqueeze(-1) * d_h).to(h.dtype), (g * x).sum(tokens), g.sum(tokens)


#: Arguments of operators that are no tensors.
SETTINGS = frozenset({"n", "write", "mapping", "iterations", "eps", "norm", "norm_eps", "read_dtype"})


@functools.cache  # an operator asks at every call
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    parameters = inspect.signature(function).parameters
    return tuple(parameters), tuple(one.default for one in parameters.values())


def bound(function: Callable[..., Any], args: Sequence[Any]) -> dict[str, Any]:
    """Return arguments by name, with the defaults that a dispatcher leaves out."""
    names, defaults = _parameters(function)
    return dict(zip(names, (*args, *defaults[len(args) :]), strict=True))


def tensors_of(function: Callable[..., Any]) -> list[str]:
    """Return the arguments of an operator that have a gradient, in the order of its backward."""
    return [key for key in inspect.signature(function).parameters if key not in SETTINGS]


def _with_settings(function: Callable[..., Any], settings: dict[str, Any]) -> inspect.Signature:
    old = inspect.signature(function)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return old.replace(
        parameters=[*old.parameters.values(), *(inspect.Parameter(k, kind, default=v) for k, v in settings.items())]
    )


def _filled(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return *given, *defaults[len(given) :]


def normed(at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let an operator take `norm, gain, shift, norm_eps`, and return `moments`, [..., 0] without.

    Its result number `at` is h. It is cast to a `read_dtype`, the last argument.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        count = len(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any) -> tuple[Tensor, ...]:
            results = list(function(*args[:count]))
            norm, gain, shift, eps, dtype = _filled(args[count:], ("", None, None, 0.0, None))
            h = results[at]
            moments = h.new_empty((*h.shape[:-1], 0), dtype=torch.promote_types(h.dtype, torch.float32))
            if norm:
                results[at], moments = normalize(h, norm, gain, shift, eps)
            results[at] = results[at] if dtype is None else results[at].to(dtype)
            return *results, moments

        call.__signature__ = _with_settings(function, {**_SETTINGS, "norm_eps": 0.0, "read_dtype": None})  # type: ignore[attr-defined]
        return call

    return decorate


def normed_backward(read: Callable[..., Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a backward take `norm, gain, shift, moments`, and return the gradients of gain and shift.

    `read` computes h from the arguments by name. What is absent has a gradient without numbers.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any) -> tuple[Tensor, ...]:
            given = dict(zip(names, args, strict=False))
            norm, gain, shift, moments = _filled(args[len(names) :], ("", None, None, None))
            sums: Sequence[Tensor | None] = (None, None)
            if norm and given["grad_h"] is not None:
                given["grad_h"], *sums = normalize_backward(given["grad_h"], read(given), moments, norm, gain)
            found = function(*given.values())
            nothing = found[0].new_empty(0)
            for one, total in zip((gain, shift), sums, strict=True):
                found += (nothing if one is None else torch.zeros_like(one) if total is None else total.to(one.dtype),)
            return found  # type: ignore[no-any-return]

        call.__signature__ = _with_settings(function, {**_SETTINGS, "moments": None})  # type: ignore[attr-defined]
        return call

    return decorate
