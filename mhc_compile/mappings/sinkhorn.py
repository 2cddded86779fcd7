"""Sinkhorn–Knopp: H_res on (almost) the Birkhoff polytope of doubly stochastic matrices.

Source: arXiv 2512.24880 v2, equations 8 and 9: M0 = exp(logits), then `iterations` times columns,
then rows. Rows come last: row sums (the gain of the forward pass) are exact, column sums (the gain
of the gradient) approximate. Shapes: logits and matrix are [..., n, n]; index -2 is the row i (the
new stream), index -1 the column j (the old stream).

Two facts shape the code.

- `exp` of a large logit overflows and a row may underflow as a whole. The first column and the
  first row step are therefore done on logarithms. After them every column sum lies in [1/n, n], and
  so does every later sum (each entry was divided by at most n), so the remaining steps can multiply
  and divide without a guard: nothing becomes inf or nan, at any logits that are finite.
- The gradient is that of the iteration as it was run, not of its limit: with large logits 20
  iterations do not converge, and the implicit gradient is then wrong. One normalisation `M' = M /
  s(M)` has the adjoint `G = (G' − ⟨G', M'⟩) / s`, so the backward needs only the sums s (n numbers
  a step), and recovers every earlier M by multiplying back. Nothing but the logits is kept between
  forward and backward.

With `eps` > 0 the steps are DeepSeek-V4's (`transformers.models.deepseek_v4`, there on the
transposed matrix): a softmax over columns, plus eps; then every division is by a sum plus eps. No
sum can vanish, so logarithms are not needed; the adjoint of a step is as above with s + eps for s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mhc_compile.mappings.base import ResidualMapping


def _tokens_last(matrices: Tensor) -> Tensor:
    """Return [n, n, T], contiguous, so that sums over rows or columns add vectors of T tokens."""
    n = matrices.shape[-1]
    return matrices.reshape(-1, n, n).permute(1, 2, 0).contiguous()


def _tokens_first(matrices: Tensor, like: Tensor) -> Tensor:
    return matrices.permute(2, 0, 1).reshape(like.shape)


def _first_round(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms after the first column step and the first row step, [n, n, T]."""
    columns = logits - torch.logsumexp(logits, 0, keepdim=True)
    return columns, columns - torch.logsumexp(columns, 1, keepdim=True)


def _sums(matrix: Tensor, axis: int, eps: float) -> Tensor:
    total = matrix.sum(axis, keepdim=True)
    return total + eps if eps else total


def _first_round_with(logits: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax over columns, the matrix after the row step, and its divisors."""
    columns = torch.softmax(logits, 0)
    matrix = columns + eps
    row = _sums(matrix, 1, eps)
    return columns, matrix / row, row


def sinkhorn(logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Return matrices [..., n, n] of logits [..., n, n], float32 or float64.

    Rows sum to 1 (with eps, to 1 - eps), columns nearly so.
    """
    tokens_last = _tokens_last(logits)
    matrix = _first_round_with(tokens_last, eps)[1] if eps else _first_round(tokens_last)[1].exp()
    for _ in range(iterations - 1):
        matrix = matrix / _sums(matrix, 0, eps)
        matrix = matrix / _sums(matrix, 1, eps)
    return _tokens_first(matrix, logits)


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Return the gradient [..., n, n] of the logits, exact for any number of iterations."""
    if eps:
        columns, matrix, first = _first_round_with(_tokens_last(logits), eps)
    else:
        log_columns, log_rows = _first_round(_tokens_last(logits))
        columns, matrix = log_columns.exp(), log_rows.exp()
    sums: list[tuple[Tensor, Tensor]] = []
    for _ in range(iterations - 1):
        column = _sums(matrix, 0, eps)
        matrix = matrix / column
        row = _sums(matrix, 1, eps)
        matrix = matrix / row
        sums.append((column, row))
    g = _tokens_last(grad)
    for column, row in reversed(sums):
        g = (g - (g * matrix).sum(1, keepdim=True)) / row
        matrix = matrix * row
        g = (g - (g * matrix).sum(0, keepdim=True)) / column
        matrix = matrix * column
    if eps:
        g = columns * (g - (g * matrix).sum(1, keepdim=True)) / first
    else:  # the first round is a row softmax of a column log-softmax
        g = g * matrix
        g = g - matrix * g.sum(1, keepdim=True)
    g = g - columns * g.sum(0, keepdim=True)
    return _tokens_first(g, logits)


@dataclass(frozen=True)
class Sinkhorn(ResidualMapping):
    """The paper's mapping: n² logits, row-major, 20 iterations by default.

    Attributes:
        eps: see the module; 0 in the paper.
        last: the side that is normalised last. With "columns" the matrix is the transposed one of
            the transposed logits (Liger-Kernel).
    """

    eps: float = 0.0
    last: str = "rows"

    name: ClassVar[str] = "sinkhorn"
    iterative: ClassVar[bool] = True

    #: Logit of the diagonal at the start: H_ii = 0.95 at n = 4, H_ij = 0.017. From 8 on the
    #: off-diagonal hardly receives a gradient.
    diagonal: ClassVar[float] = 4.0

    def logits(self, n: int) -> int:
        """Return n²."""
        return n * n

    def init_preserve(self, n: int) -> Tensor:
        """Return `diagonal` on the diagonal, 0 elsewhere."""
        return (self.diagonal * torch.eye(n)).flatten()

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Compute [..., n, n] from [..., n²] by the operator, for which a compiler has a kernel."""
        return self._turned(torch.ops.mhc.sinkhorn(self._turned(logits.unflatten(-1, (n, n))), iterations, self.eps))

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Compute [..., n²] from [..., n, n]."""
        turned = self._turned(logits.unflatten(-1, (n, n)))
        d_logits = torch.ops.mhc.sinkhorn_backward(self._turned(grad), turned, iterations, self.eps)
        return self._turned(d_logits).flatten(-2)

    def _turned(self, matrices: Tensor) -> Tensor:
        return matrices.transpose(-1, -2) if self.last == "columns" else matrices

    def flops(self, n: int, iterations: int) -> int:
        """Return two for every entry in each column step and each row step."""
        return 4 * n * n * iterations
