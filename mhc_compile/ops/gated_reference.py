"""Registers the operators of other systems: a read with one weight per channel, and read-outs.

    mhc::gated_read(streams, phi, norm, up, eps) -> (h, post, res)     the read of Qwen4-Exp
    mhc::gated_read_out(streams, phi, norm, up, eps) -> x              its read-out
    mhc::read_out(streams, weight, bias, scale, pre_eps, eps) -> x     that of DeepSeek-V4 and HY-V4

They are compositions of ATen operations, visible to autograd, fake tensors and compilers. Streams
are [..., n, C]; results [..., C] have their dtype; all between is float32, or float64 for float64
streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhc_compile.errors import ShapeError
from mhc_compile.ops.library import LIBRARY, shown
from mhc_compile.ops.reference import compute_dtype, inverse_rms, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

for _schema in (
    "gated_read(Tensor streams, Tensor phi, Tensor norm, Tensor up, float eps) -> (Tensor h, Tensor post, Tensor res)",
    "gated_read_out(Tensor streams, Tensor phi, Tensor norm, Tensor up, float eps) -> Tensor",
    "read_out(Tensor streams, Tensor weight, Tensor bias, Tensor scale, float pre_eps, float eps) -> Tensor",
):
    LIBRARY.define(_schema)


def read_out(streams: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, pre_eps: float, eps: float) -> Tensor:
    """Return the learned end of a chain, [..., C]: `Σ_j w_j X_j` with weights of the token.

    `w = sigmoid(a (vec(X) W) / rms(vec(X)) + b) + pre_eps`; weight W [n C, n], bias b [n], scale a
    [1]. Source: `transformers.models.deepseek_v4.DeepseekV4HyperHead`.

    Raises:
        ShapeError: the parameters do not fit the streams.
    """
    n, width = streams.shape[-2:]
    if tuple(weight.shape) != (n * width, n) or tuple(bias.shape) != (n,) or tuple(scale.shape) != (1,):
        raise ShapeError(
            f"mhc::read_out: streams {shown(streams)} need weight [{n * width}, {n}], bias [{n}] and scale [1]; got"
            f" {shown(weight)}, {shown(bias)} and {shown(scale)}"
        )
    dtype = compute_dtype(streams)
    with without_autocast(streams):
        wide = streams.to(dtype)
        flat = wide.flatten(-2)
        z = (flat @ weight.to(dtype)) * inverse_rms(flat, eps)
        weights = torch.sigmoid(scale.to(dtype) * z + bias.to(dtype)) + pre_eps
        return (weights.unsqueeze(-1) * wide).sum(-2).to(streams.dtype)


def _normalised(streams: Tensor, norm: Tensor, eps: float) -> Tensor:
    n, width = streams.shape[-2:]
    wide = streams.to(compute_dtype(streams))
    return wide * inverse_rms(wide, eps) * (1.0 + norm.to(wide.dtype).reshape(n, width))


def _gate(normalised: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the mean of the streams, each channel times its gate, which `down` [..., r] gives."""
    gates = torch.sigmoid(torch.nn.functional.silu(down) @ up.to(down.dtype)).reshape(normalised.shape)
    return torch.mean(gates * normalised, -2)


def _check_gated(name: str, streams: Tensor, phi: Tensor, norm: Tensor, up: Tensor, more: int) -> int:
    n, width = streams.shape[-2:]
    rank = up.shape[0] if up.dim() == 2 else 0
    fits = tuple(phi.shape) == (n * width, rank + more) and tuple(norm.shape) == (n * width,)
    if not fits or up.dim() != 2 or up.shape[1] != n * width:
        raise ShapeError(
            f"mhc::{name}: streams {shown(streams)} need phi [{n * width}, rank{f' + {more}' * bool(more)}], norm [{n * width}] and up"
            f" [rank, {n * width}]; got {shown(phi)}, {shown(norm)} and {shown(up)}"
        )
    return rank


def gated_read(streams: Tensor, phi: Tensor, norm: Tensor, up: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(h [..., C], post [..., n], res [..., n, n])` of a read with a weight per channel.

        x̂    = rmsnorm(X) (1 + norm)                 each stream by itself
        h    = mean_j σ(silu(x̂ W_down / n) W_up)_j ∘ x̂_j
        post = 2 σ(x̂ W_inject / n)
        res  = I

    Source: `transformers.models.qwen4_exp.Qwen4ExpTextGatedResidual`. Shapes: phi [n C, r + n] is
    W_down and W_inject, norm [n C], up W_up [r, n C].

    Raises:
        ShapeError: the parameters do not fit the streams.
    """
    n = streams.shape[-2]
    rank = _check_gated("gated_read", streams, phi, norm, up, n)
    with without_autocast(streams):
        normalised = _normalised(streams, norm, eps)
        projected = (normalised.flatten(-2) @ phi.to(normalised.dtype)) / n
        h = _gate(normalised, projected[..., :rank], up)
        post = 2.0 * torch.sigmoid(projected[..., rank:])
        return h.to(streams.dtype), post, torch.diag_embed(torch.ones_like(post))


def gated_read_out(streams: Tensor, phi: Tensor, norm: Tensor, up: Tensor, eps: float) -> Tensor:
    """Return the end of a chain, [..., C]: `h` of `gated_read`, with phi [n C, r].

    Raises:
        ShapeError: the parameters do not fit the streams.
    """
    _check_gated("gated_read_out", streams, phi, norm, up, 0)
    with without_autocast(streams):
        normalised = _normalised(streams, norm, eps)
        down = (normalised.flatten(-2) @ phi.to(normalised.dtype)) / streams.shape[-2]
        return _gate(normalised, down, up).to(streams.dtype)


for _name, _function in (("gated_read", gated_read), ("gated_read_out", gated_read_out), ("read_out", read_out)):
    LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")
