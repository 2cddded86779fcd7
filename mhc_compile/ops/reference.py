"""Reference mathematics of one hyper-connection, in plain ATen operations.

Source: "mHC: Manifold-Constrained Hyper-Connections", arXiv 2512.24880 v2, section 4. Convention:
the paper's (`pre, post, res`; H_res is applied as `H X`; Sinkhorn normalises columns, then rows).
Shapes, with `...` any number of token axes:

    streams  [..., n, C]   model dtype      n residual streams of width C
    phi      [n C, K]      K = 2 n + (number of residual logits), n² + 2 n for Sinkhorn
    bias     [K]           static logits, ordered pre (n), post (n), residual
    scale    [3]           a_pre, a_post, a_res
    pre      [..., n]      float32 or wider, as every coefficient
    post     [..., n]
    res      [..., n, n]   res[..., i, j] is the weight of old stream j in new stream i

`mapping` is a convention as a string (`mhc_compile.config.coefficient_spec`): the name of the
residual mapping, and the epsilons of other systems. Static coefficients, the same for every token,
have no projection: phi is then [n C, 0] and scale [0]. Coefficients are computed in float32, or
float64 for float64 streams, whatever the dtype of the model and whatever autocast says.

The functions are the eager kernels, the decompositions to ATen, and the oracle of the tests.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.mappings import mapping_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from mhc_compile.config.coefficient_spec import Convention


def dense(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Make every output of `kernel` contiguous, as the fake kernels promise."""

    def call(*args: Any) -> Any:
        out = kernel(*args)
        return tuple(map(torch.Tensor.contiguous, out)) if isinstance(out, tuple) else out.contiguous()

    return call


def compute_dtype(streams: Tensor) -> torch.dtype:
    """Return the dtype of the coefficients: float32, or float64 for float64 streams."""
    return torch.promote_types(streams.dtype, torch.float32)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast, which would compute the projection in bfloat16."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def inverse_rms(flat: Tensor, eps: float) -> Tensor:
    """Return one over the root mean square of the last axis, [..., 1]."""
    return torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def _logits(z: Tensor, bias: Tensor, scale: Tensor, n: int, convention: Convention) -> Iterator[Tensor]:
    """Yield the logits of pre, post and res."""
    offset, gain = _times(bias, convention.gate_speed), _times(scale, convention.scale_speed)
    static = scale.numel() == 0  # z is zero
    for i, part in enumerate((slice(n), slice(n, 2 * n), slice(2 * n, None))):
        yield (z[..., part] if static else gain[i] * z[..., part]) + offset[part]


def _projection(flat: Tensor, phi: Tensor, bias: Tensor, eps: float) -> Tensor:
    if phi.shape[1] == 0:
        return flat.new_zeros((*flat.shape[:-1], bias.shape[0]))
    return (flat @ phi) * inverse_rms(flat, eps)


def _plus(value: Tensor, eps: float) -> Tensor:
    return value + eps if eps else value


def _times(value: Tensor, factor: float) -> Tensor:
    return value * factor if factor != 1 else value


def coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the coefficients of one site: `(pre, post, res, z)`.

        z    = (vec(X) phi) / rms(vec(X))         multiply, then divide; zero with phi [n C, 0]
        pre  = sigmoid(a_pre z_pre + b_pre)       + pre_eps of the convention, 0 in the paper
        post = 2 sigmoid(a_post z_post + b_post)  post_range instead of 2, and + post_eps
        res  = project(mat(a_res z_res + b_res))

    b is multiplied by the gate_speed of the convention and a by its scale_speed, both 1 in the
    paper. The projection `z` [..., K] is returned because the backward needs it.
    """
    n = streams.shape[-2]
    dtype = compute_dtype(streams)
    convention = parse(mapping)
    with without_autocast(streams):
        flat = streams.flatten(-2).to(dtype)
        z = _projection(flat, phi.to(dtype), bias, eps)
        pre, post, res = _logits(z, bias.to(dtype), scale.to(dtype), n, convention)
        return (
            _plus(torch.sigmoid(pre), convention.pre_eps),
            _plus(convention.post_range * torch.sigmoid(post), convention.post_eps),
            mapping_of(mapping).matrix(res, n, iterations),
            z,
        )


def differentiable_coefficients(
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, mapping: str, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `coefficients`, such that autograd gives the gradients of `coefficients_backward`."""
    convention = parse(mapping)
    if convention.gate_speed != 1:
        bias = (convention.gate_speed * bias).detach() + (bias - bias.detach())
        mapping = str(replace(convention, gate_speed=1.0))
    return coefficients(streams, phi, bias, scale, mapping, iterations, eps)


def coefficients_backward(
    grad_pre: Tensor, grad_post: Tensor, grad_res: Tensor, grad_z: Tensor,
    streams: Tensor, phi: Tensor, bias: Tensor, scale: Tensor, pre: Tensor, post: Tensor, z: Tensor,
    mapping: str, iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `coefficients` for `(streams, phi, bias, scale)`, derived by hand.

    With p = vec(X) phi, r = 1 / rms(vec(X)) and z = p r:

        d phi    = vec(X)ᵀ (r dz)
        d vec(X) = (r dz) phiᵀ − vec(X) r² (Σ_k dz_k z_k) / (n C)

    That of bias is divided by the gate_speed: it is what the paper's bias would have. A gate_speed
    is so a learning rate that is as many times higher, in an optimizer whose steps do not depend on
    the size of gradients, and does not change the global norm that clipping looks at. Multiplied,
    the gates' gradients outweighed those of the whole model. That of scale is the derivative.
    """
    n = streams.shape[-2]
    dtype = compute_dtype(streams)
    convention = parse(mapping)
    with without_autocast(streams):
        flat = streams.flatten(-2).to(dtype)
        weight, gain = phi.to(dtype), _times(scale.to(dtype), convention.scale_speed)
        *_, res_logits = _logits(z, bias.to(dtype), scale.to(dtype), n, convention)
        before, after = _plus(pre, -convention.pre_eps), _plus(post, -convention.post_eps)
        d_pre = grad_pre * before * (1.0 - before)
        d_post = grad_post * after * (1.0 - after / convention.post_range)
        d_res = mapping_of(mapping).backward(grad_res, res_logits, n, iterations)
        d_logits = torch.cat([d_pre, d_post, d_res], dim=-1)
        d_bias = d_logits.flatten(0, -2).sum(0)
        if not phi.shape[1]:
            return torch.zeros_like(streams), torch.zeros_like(phi), d_bias.to(bias.dtype), torch.zeros_like(scale)
        d_scale = torch.stack(
            [(d_pre * z[..., :n]).sum(), (d_post * z[..., n : 2 * n]).sum(), (d_res * z[..., 2 * n :]).sum()]
        )
        d_scale = _times(d_scale, convention.scale_speed)
        d_z = torch.cat([d_pre * gain[0], d_post * gain[1], d_res * gain[2]], dim=-1) + grad_z
        inverse = inverse_rms(flat, eps)
        scaled = d_z * inverse
        d_phi = flat.flatten(0, -2).t() @ scaled.flatten(0, -2)
        radial = inverse.square() * (d_z * z).sum(-1, keepdim=True) / flat.shape[-1]
        d_flat = scaled @ weight.t() - flat * radial
        d_streams = d_flat.unflatten(-1, streams.shape[-2:]).to(streams.dtype)
        return d_streams, d_phi.to(phi.dtype), d_bias.to(bias.dtype), d_scale.to(scale.dtype)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """Return `h = Σ_j pre_j X_j`, [..., C] in the dtype of the streams."""
    with without_autocast(streams):
        wide = streams.to(compute_dtype(streams))
        return (pre.unsqueeze(-2) @ wide).squeeze(-2).to(streams.dtype)


def collapse_fused(streams: Tensor, pre: Tensor) -> Tensor:
    """Compute `collapse` in broadcast form, which Inductor fuses with its neighbours."""
    with without_autocast(streams):
        return (pre.unsqueeze(-1) * streams.to(compute_dtype(streams))).sum(-2).to(streams.dtype)


def collapse_backward(grad: Tensor, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `collapse` for `(streams, pre)`: `pre_j dh` and `⟨dh, X_j⟩`."""
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        g = grad.to(dtype)
        d_streams = pre.unsqueeze(-1) * g.unsqueeze(-2)
        d_pre = (streams.to(dtype) @ g.unsqueeze(-1)).squeeze(-1)
        return d_streams.to(streams.dtype), d_pre


def collapse_backward_fused(grad: Tensor, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `collapse_backward` in broadcast form."""
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        g = grad.to(dtype).unsqueeze(-2)
        return (pre.unsqueeze(-1) * g).to(streams.dtype), (streams.to(dtype) * g).sum(-1)


def update(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return the new streams `X' = H_res X + H_postᵀ f`, [..., n, C] in the dtype of the streams.

    `branch` [..., C] is the output f of the branch, in any floating dtype. The coefficients may be
    narrower than the streams, where the trunk was cast between them.
    """
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        mixed = res.to(dtype) @ streams.to(dtype)
        return (mixed + post.to(dtype).unsqueeze(-1) * branch.to(dtype).unsqueeze(-2)).to(streams.dtype)


def update_fused(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Compute `update` in broadcast form: Inductor fuses nothing with a batched matrix product."""
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        mixed = (res.to(dtype).unsqueeze(-1) * streams.to(dtype).unsqueeze(-3)).sum(-2)
        return (mixed + post.to(dtype).unsqueeze(-1) * branch.to(dtype).unsqueeze(-2)).to(streams.dtype)


def update_backward(
    grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `update` for `(streams, branch, post, res)`.

    dX = H_resᵀ dX',  df = Σ_i post_i dX'_i,  dpost_i = ⟨dX'_i, f⟩,  dres_ij = ⟨dX'_i, X_j⟩
    """
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        g, wide, f = grad.to(dtype), streams.to(dtype), branch.to(dtype)
        d_streams = res.to(dtype).transpose(-1, -2) @ g
        d_branch = (post.to(dtype).unsqueeze(-2) @ g).squeeze(-2)
        d_post = (g @ f.unsqueeze(-1)).squeeze(-1)
        d_res = g @ wide.transpose(-1, -2)
        return d_streams.to(streams.dtype), d_branch.to(branch.dtype), d_post.to(post.dtype), d_res.to(res.dtype)


def update_backward_fused(
    grad: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `update_backward` in broadcast form."""
    with without_autocast(streams):
        dtype = compute_dtype(streams)
        g, wide, f = grad.to(dtype), streams.to(dtype), branch.to(dtype)
        d_streams = (res.to(dtype).transpose(-1, -2).unsqueeze(-1) * g.unsqueeze(-3)).sum(-2)
        d_branch = (post.to(dtype).unsqueeze(-1) * g).sum(-2)
        d_post = (g * f.unsqueeze(-2)).sum(-1)
        d_res = (g.unsqueeze(-2) * wide.unsqueeze(-3)).sum(-1)
        return d_streams.to(streams.dtype), d_branch.to(branch.dtype), d_post.to(post.dtype), d_res.to(res.dtype)
