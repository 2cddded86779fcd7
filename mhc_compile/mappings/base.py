"""`ResidualMapping`: from logits to a mixing matrix, and the initial logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mhc_compile import _torch
from mhc_compile.errors import OptionError


class ResidualMapping:
    """A family of matrices H_res. `n` is the number of streams, K_res = `logits(n)`.

    Instances are stateless; one serves every site. Values are float32 or float64, with any number
    of token axes in front. To add a family, write a subclass with a name, `logits`,
    `init_preserve` and `matrix`, and call `mhc_compile.register_mapping`. Its methods are traced by
    compilers: they consist of torch operations, and do not depend on the values of tensors.
    """

    #: The name for `Options(mapping=...)`.
    name: ClassVar[str]

    #: Whether rows and columns of the matrices sum to one (the columns of sinkhorn nearly so).
    doubly_stochastic: ClassVar[bool] = True

    #: Whether `iterations` changes the matrices.
    iterative: ClassVar[bool] = False

    def check(self, n: int) -> None:
        """Raise OptionError for a number of streams that the family does not support."""

    def logits(self, n: int) -> int:
        """Return the number of logits of H_res: columns of phi besides the 2 n of pre and post."""
        raise NotImplementedError

    def init_preserve(self, n: int) -> Tensor:
        """Return initial logits [K_res], float32: row-stochastic, near the identity, learning."""
        raise NotImplementedError

    def init_random(self, n: int) -> Tensor:
        """Return initial logits [K_res], float32, for random projections: 0, for even mixing."""
        return torch.zeros(self.logits(n))

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Return the matrices [..., n, n] of logits [..., K_res]; index -2 is the new stream."""
        raise NotImplementedError

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Return the gradient [..., K_res] of the logits for `grad` [..., n, n] of the matrices.

        By default autograd differentiates `matrix`, which is computed again.
        """
        with _torch.autograd_inside_operators():
            leaf = logits.detach().requires_grad_()
            matrix = self.matrix(leaf, n, iterations)
            if not matrix.requires_grad:  # it does not depend on the logits
                return torch.zeros_like(logits)
            return torch.autograd.grad(matrix, leaf, grad)[0]

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """Return the floating-point operations of `matrix` for one token, by default a guess."""
        return 2 * n * n * self.logits(n)

    def reject(self, n: int, those: str) -> OptionError:
        """Return the error of `check`; `those` are the numbers of streams that are supported."""
        return OptionError(
            f"mapping {self.name!r} has no matrices for {n} streams, only for {those}; choose another 'streams', or mapping 'sinkhorn'"
        )
