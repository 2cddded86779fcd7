"""Sinkhorn–Knopp: H_res on (almost) the Birkhoff polytope of doubly stochastic matrices.

Source: arXiv 2512.24880 v2, equations 8 and 9: M0 = exp(logits), then `iterations` times columns, then rows. Rows come last: row sums (the
gain of the forward pass) are exact, column sums (the gain of the gradient) approximate. Shapes: logits and matrix are [..., n, n];
index -2 is the row i (the new stream), index -1 the column j (the old stream).

Two facts shape the code.

- `exp` of a large logit overflows and a row may underflow as a whole. The first column and the first row step are therefore done on
  logarithms. After them every column sum lies in [1/n, n], and so does every later sum (each entry was divided by at most n), so the
  remaining steps can multiply and divide without a guard: nothing becomes inf or nan, at any logits that are finite.
- The gradient is that of the iteration as it was run, not of its limit: with large logits 20 iterations do not converge, and the implicit
  gradient is then wrong. One normalisation `M' = M / s(M)` has the adjoint `G = (G' − ⟨G', M'⟩) / s`, so the backward needs only the
  sums s (n numbers a step), and recovers every earlier M by multiplying back. Nothing but the logits is kept between forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.mappings.base import Mapping

__all__ = ["Sinkhorn", "sinkhorn", "sinkhorn_backward"]


def _tokens_last(matrices: Tensor) -> Tensor:
    """[..., n, n] to [n, n, T], contiguous: sums over rows or columns then add whole vectors of T tokens."""
    n = matrices.shape[-1]
    return matrices.reshape(-1, n, n).permute(1, 2, 0).contiguous()


def _tokens_first(matrices: Tensor, like: Tensor) -> Tensor:
    return matrices.permute(2, 0, 1).reshape(like.shape)


def _first_round(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Columns, then rows, on logarithms. Returns the logarithms after each of the two steps, [n, n, T]."""
    columns = logits - torch.logsumexp(logits, 0, keepdim=True)
    return columns, columns - torch.logsumexp(columns, 1, keepdim=True)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Matrices [..., n, n] of logits [..., n, n]; rows sum to 1, columns nearly so. Float32 or float64."""
    matrix = _first_round(_tokens_last(logits))[1].exp()
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return _tokens_first(matrix, logits)


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """Gradient [..., n, n] with respect to the logits of `sinkhorn`, exact for any number of iterations."""
    log_columns, log_rows = _first_round(_tokens_last(logits))
    matrix = log_rows.exp()
    sums: list[tuple[Tensor, Tensor]] = []
    for _ in range(iterations - 1):
        column = matrix.sum(0, keepdim=True)
        matrix = matrix / column
        row = matrix.sum(1, keepdim=True)
        matrix = matrix / row
        sums.append((column, row))
    g = _tokens_last(grad)
    for column, row in reversed(sums):
        g = (g - (g * matrix).sum(1, keepdim=True)) / row
        matrix = matrix * row
        g = (g - (g * matrix).sum(0, keepdim=True)) / column
        matrix = matrix * column
    # The first round is a row softmax of a column log-softmax.
    g = g * matrix
    g = g - matrix * g.sum(1, keepdim=True)
    g = g - log_columns.exp() * g.sum(0, keepdim=True)
    return _tokens_first(g, logits)


class Sinkhorn(Mapping):
    """The paper's mapping: n² logits, row-major, 20 iterations by default."""

    name = "sinkhorn"
    iterative = True

    #: Logit of the diagonal at the start: H_ii = 0.95 at n = 4, H_ij = 0.017. From 8 on the off-diagonal hardly receives a gradient.
    diagonal = 4.0

    def logits(self, n: int) -> int:
        """n²."""
        return n * n

    def start(self, n: int) -> Tensor:
        """`diagonal` on the diagonal, 0 elsewhere."""
        return (self.diagonal * torch.eye(n)).flatten()

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:
        """[..., n²] to [..., n, n], through the op, so that a compiler sees one node and can bring its own kernel."""
        return torch.ops.mhc.sinkhorn(logits.unflatten(-1, (n, n)), iterations)  # type: ignore[no-any-return]

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:
        """[..., n, n] to [..., n²]."""
        return torch.ops.mhc.sinkhorn_backward(grad, logits.unflatten(-1, (n, n)), iterations).flatten(-2)  # type: ignore[no-any-return]

    def flops(self, n: int, iterations: int) -> int:
        """An addition and a multiplication for every entry, of the columns and of the rows."""
        return 4 * n * n * iterations
