"""Lazy steps from the equations, in float64, with gradients by autograd.

Nothing of the package computes here.
"""

from __future__ import annotations

import torch
from helpers.norms import by_torch, weights_of

N, ITERATIONS, EPS = 4, 5, 1e-6
HOW = ("sinkhorn", ITERATIONS, EPS)


def values(sites, width, tokens, *, copies=False, dtype=torch.float64):
    """`(streams, branches, post, res, phi, bias, scale)`; with `copies` one stream for n."""
    real = torch.promote_types(dtype, torch.float32)
    return (
        torch.randn(*tokens, 1 if copies else N, width, dtype=dtype),
        [torch.randn(*tokens, width, dtype=dtype) for _ in range(sites)],
        [2 * torch.rand(*tokens, N, dtype=real) for _ in range(sites)],
        [torch.softmax(torch.randn(*tokens, N, N, dtype=real), -1) for _ in range(sites)],
        0.3 * torch.randn(N * width, N * N + 2 * N, dtype=real) / width**0.5,
        torch.randn(N * N + 2 * N, dtype=real),
        0.5 + torch.rand(3, dtype=real),
    )


def ended(streams, branches, post, res):
    """The streams after sites that end: `X' = H_res X + H_postᵀ f`."""
    x = streams.expand(*streams.shape[:-2], N, -1)
    for f, p, r in zip(branches, post, res, strict=True):
        x = torch.einsum("...ij,...jc->...ic", r, x) + torch.einsum("...i,...c->...ic", p, f)
    return x


def begun(x, phi, bias, scale):
    """`(h, post, res)` of the site that begins."""
    v = x.flatten(-2)
    z = (v @ phi) / (v.square().mean(-1, keepdim=True) + EPS).sqrt()
    pre, post, logits = (
        a * part + b for a, part, b in zip(scale, z.split([N, N, N * N], -1), bias.split([N, N, N * N]), strict=True)
    )
    res = logits.unflatten(-1, (N, N)).exp()
    for _ in range(ITERATIONS):
        res = res / res.sum(-2, keepdim=True)
        res = res / res.sum(-1, keepdim=True)
    return torch.einsum("...i,...ic->...c", pre.sigmoid(), x), 2 * post.sigmoid(), res


def close(one, other, tolerance):
    return one.shape == other.shape and bool(
        (one.double() - other.double()).norm() <= tolerance * (1e-12 + other.double().norm())
    )


def oracle(tensors, grads, norm=()):
    """The results of a step, and the gradients of its old streams and its own tensors."""
    streams, branches, post, res, *site = tensors
    old = ended(streams, branches[:-1], post[:-1], res[:-1]) if len(branches) > 1 else streams
    own = (old, branches[-1], post[-1], res[-1], *site, *weights_of(norm))
    leaves = [t.detach().clone().requires_grad_() for t in own]
    after = ended(leaves[0], *([one] for one in leaves[1:4]))
    h, *coefficients = begun(after, *leaves[4:7])
    gain, shift = (*leaves[7:], None, None)[:2]
    results = after, by_torch(h, *norm[:1], gain, shift, *norm[3:]), *coefficients
    outs, given = zip(*((out, grad) for out, grad in zip(results, grads, strict=True) if grad is not None), strict=True)
    return results, torch.autograd.grad(outs, leaves, given, allow_unused=True, materialize_grads=True)


def incoming(width, tokens):
    return [torch.randn(*tokens, *shape, dtype=torch.float64) for shape in ((N, width), (width,), (N,), (N, N))]
