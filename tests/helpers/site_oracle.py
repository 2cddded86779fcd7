"""One site in float64 from the equations alone, with gradients by autograd, and the comparison of
the operators `mhc::` with it on any device. Nothing of the package computes here.

Equations: arXiv 2512.24880 v2, section 4; the epsilons and the order of transformers' DeepSeek-V4
and of Liger-Kernel; mappings of arXiv 2601.05732 (permutations) and 2601.21579 (kronecker).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from helpers.gates import faster
from torch import Tensor

from mhc_compile.config.coefficient_spec import Convention, parse

EPS = 1e-6
#: The tensors of every operator in the order of its schema, and its results that have a gradient.
OPERATORS = {
    "read": ("streams phi bias scale", (0, 2, 3)),
    "step": ("streams branch post res phi bias scale", (0, 1, 3, 4)),
    "shifted_step": ("streams branch post res pre phi bias scale", (0, 1, 2, 3, 4)),
    "mix_read": ("streams branch post res pre", (0, 1)),
    "update": ("streams branch post res", (0,)),
    "close": ("streams branch post res", (0,)),
}
#: Where their result is that a norm changes.
NORMED = {"read": 0, "step": 1, "shifted_step": 1, "mix_read": 1}
#: Largest relative error in the 2-norm of a tensor: of one in this dtype, and of a float32 one that
#: is computed from streams in this dtype.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 3e-3)}


def logits_of(mapping: str, n: int) -> int:
    """The number of residual logits."""
    counts = {"identity": 0, "permutations": math.factorial(n), "kronecker": 2 * (n.bit_length() - 1)}
    return counts.get(mapping, n * n)


def residual(z: Tensor, convention: Convention, n: int, iterations: int) -> Tensor:
    """H_res [..., n, n] from logits [..., K]."""
    lead, eye = z.shape[:-1], torch.eye(n, dtype=z.dtype, device=z.device)
    if convention.mapping == "identity":
        return eye.expand(*lead, n, n)
    if convention.mapping == "permutations":
        return sum(w[..., None, None] * eye[list(p)] for w, p in zip(
            z.softmax(-1).unbind(-1), itertools.permutations(range(n)), strict=True
        ))  # fmt: skip
    if convention.mapping == "kronecker":
        H = z.new_ones(*lead, 1, 1)
        for pair in z.unflatten(-1, (-1, 2)).softmax(-1).unbind(-2) if n > 1 else ():
            p, q = pair[..., :1], pair[..., 1:]
            U = torch.stack([torch.cat([p, q], -1), torch.cat([q, p], -1)], -2)
            H = torch.einsum("...ij,...kl->...ikjl", H, U).flatten(-4, -3).flatten(-2)
        return H
    M = z.unflatten(-1, (n, n))
    if convention.mapping == "unconstrained":
        return M
    # transformers' `comb`: rows, then columns last. It is applied transposed, but by Liger.
    M, eps = M if convention.last == "columns" else M.transpose(-1, -2), convention.sinkhorn_eps
    M = M.softmax(-1) + eps
    M = M / (M.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        M = M / (M.sum(-1, keepdim=True) + eps)
        M = M / (M.sum(-2, keepdim=True) + eps)
    return M if convention.last == "columns" else M.transpose(-1, -2)


class Case:
    """Inputs of one site on a device: n streams, m of them held, its convention, and a `norm` of h.

    `vectors` names which of gain and shift it has. `tokens` are the token axes. `draws` are made on
    CPU, so that every device has the same numbers.
    """

    def __init__(
        self, device, n, m, tokens, width, spec="sinkhorn", dtype=torch.float32, branch=None, iterations=20, seed=0,
        norm="", vectors="gain shift",
    ):  # fmt: skip
        self.n, self.spec, self.iterations, self.dtype, self.device = n, spec, iterations, dtype, device
        self.norm, self.vectors = norm, vectors.split() if norm else []
        columns = 2 * n + logits_of(parse(spec).mapping, n)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, dtype=torch.float32):
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        lead = tokens if isinstance(tokens, tuple) else (tokens,)
        self.tensors = {
            "streams": draw(*lead, m, width, dtype=dtype),
            "branch": draw(*lead, width, dtype=branch or dtype),
            "post": 2 * draw(*lead, n).sigmoid(),
            "res": draw(*lead, n, n).softmax(-1),
            "pre": draw(*lead, n).sigmoid(),
            "phi": draw(n * width, columns) / (n * width) ** 0.5,
            "bias": draw(columns),
            "scale": torch.tensor([0.9, 0.7, 1.1], device=device),
            "gain": 1.5 + draw(width),
            "shift": draw(width),
        }

    def keys(self, name: str) -> list[str]:
        """The names of the tensors that operator `name` takes."""
        return OPERATORS[name][0].split() + (self.vectors if name in NORMED else [])

    def of(self, name: str) -> list[Tensor]:
        """These tensors."""
        return [self.tensors[key] for key in self.keys(name)]

    def settings(self, name: str) -> tuple:
        """What follows the tensors in its schema."""
        if "phi" not in OPERATORS[name][0].split():
            return ()
        return (*([self.n] if name == "read" else []), self.spec, self.iterations, EPS)

    def call(self, name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The results of operator `name`."""
        count = len(OPERATORS[name][0].split())
        given = dict(zip(self.vectors, tensors[count:], strict=False))
        norm = (self.norm, given.get("gain"), given.get("shift"), EPS) if self.norm and name in NORMED else ()
        got = getattr(torch.ops.mhc, name)(*tensors[:count], *self.settings(name), *norm)
        return got if isinstance(got, tuple) else (got,)

    def by_equations(self, name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The same from the equations; all tensors are float64."""
        results, given = [*self._plain(name, tensors)], dict(zip(self.keys(name), tensors, strict=True))
        if name not in NORMED:
            return tuple(results)
        h = results[NORMED[name]]
        mean = h.mean(-1, keepdim=True) if self.norm == "layer" else 0 * h[..., :1]
        factor = 1 / torch.sqrt(((h - mean) ** 2).mean(-1, keepdim=True) + EPS)
        if self.norm:
            results[NORMED[name]] = (h - mean) * factor * given.get("gain", 1) + given.get("shift", 0)
        return (*results, torch.cat([mean, factor] if self.norm else [h[..., :0]], -1))

    def _plain(self, name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        given, n = dict(zip(self.keys(name), tensors, strict=True)), self.n
        X = given["streams"].expand(*given["streams"].shape[:-2], n, -1)
        if name != "read":
            X = given["res"] @ X + given["post"][..., None] * given["branch"][..., None, :]
        if name == "update":
            return (X,)
        if name == "close":
            return (X.mean(-2),)
        if name == "mix_read":
            return X, (given["pre"][..., None] * X).sum(-2)
        convention, v = parse(self.spec), X.flatten(-2)
        inverse = 1 / torch.sqrt((v * v).mean(-1, keepdim=True) + EPS)
        z = (v @ given["phi"]) * inverse
        parts = [n, n, z.shape[-1] - 2 * n]
        a, b, c = (
            s * part + bias
            for s, part, bias in zip(
                convention.scale_speed * given["scale"],
                z.split(parts, -1),
                faster(given["bias"], convention.gate_speed).split(parts),
                strict=True,
            )
        )
        pre = torch.sigmoid(a) + convention.pre_eps
        post = convention.post_range * torch.sigmoid(b) + convention.post_eps
        weights = given["pre"] if name == "shifted_step" else pre
        h = (weights[..., None] * X).sum(-2)
        after = [] if name == "read" else [X]
        return (*after, h, pre, post, residual(c, convention, n, self.iterations), z, inverse)


def error(got: Tensor, want: Tensor) -> float:
    """The distance in the 2-norm, relative to `want`."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9)) if want.numel() else 0.0


class Error(NamedTuple):
    """How far a tensor is from the equations."""

    kind: str  # "half-width", "float32" or "sums": gradients of bias and scale, in which terms cancel
    found: float
    limit: float
    where: str


def errors(case: Case, name: str, used: tuple[int, ...] | None = None) -> list[Error]:
    """Compare all results and gradients of an operator with the equations.

    Only the results `used`, by default all that can, have a gradient.
    """
    keys = case.keys(name)
    inputs = [tensor.clone().requires_grad_() for tensor in case.of(name)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, want = case.call(name, inputs), case.by_equations(name, exact)
    used = OPERATORS[name][1] if used is None else used
    seeds = [torch.randn(got[i].shape, generator=torch.Generator().manual_seed(i)) for i in used]
    seeds = [seed.to(got[i].device, got[i].dtype) for i, seed in zip(used, seeds, strict=True)]
    grads = torch.autograd.grad([got[i] for i in used], inputs, seeds, allow_unused=True)
    # H_res of some mappings is a constant.
    ends = [(want[i], seed.double()) for i, seed in zip(used, seeds, strict=True) if want[i].requires_grad]
    wanted = [None] * len(exact)
    if ends:
        outputs, weights = zip(*ends, strict=True)
        wanted = torch.autograd.grad(outputs, exact, weights, allow_unused=True)
    pairs = [(f"result {i}", a.detach(), b.detach()) for i, (a, b) in enumerate(zip(got, want, strict=True))]
    for key, x, a, b in zip(keys, inputs, grads, wanted, strict=True):
        pairs.append((f"d {key}", torch.zeros_like(x) if a is None else a, 0 * x.double() if b is None else b))
        assert pairs[-1][1].dtype == x.dtype, (name, key)
    found = []
    for what, a, b in pairs:
        where = f"mhc::{name}, {what} {list(a.shape)}, n={case.n}, {case.spec} {case.norm}"
        assert a.shape == b.shape, where
        assert a.is_contiguous(), where
        assert a.isfinite().all(), where
        wide = a.dtype == torch.float32
        limit = TOLERANCES[case.dtype if wide else a.dtype][int(wide)]
        if wide and name == "read" and what.startswith("result"):
            limit = min(limit, 1e-3)  # streams that were not rounded: a phi cut down to bfloat16 shows
        if case.norm and what == "d pre":
            limit *= 2  # Σ_j pre_j dpre_j = 0: terms cancel in each
        sums = what in ("d bias", "d scale")
        kind = "sums" if sums else "float32" if wide else "half-width"
        found.append(Error(kind, error(a, b.detach()), 10 * limit if sums else limit, where))
    return found


def assert_close(found: list[Error]) -> None:
    """Fail with all errors that are above their limit."""
    over = [f"{one.found:.1e} > {one.limit:.0e}: {one.where}" for one in found if one.found > one.limit]
    assert not over, "\n".join(over)
