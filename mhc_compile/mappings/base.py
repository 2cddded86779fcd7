"""What a residual mapping is: logits in, a mixing matrix out, and the logits it starts from."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mhc_compile.errors import OptionError

__all__ = ["ResidualMapping"]


class ResidualMapping:
    """A family of matrices H_res. `n` is the number of streams, K_res = `logits(n)`.

    Instances are stateless; one serves every site. Values are float32 or float64, with any number
    of token axes in front. A family of one's own is a subclass with a name, `logits`,
    `init_preserve` and `matrix`; `mhc_compile.register_mapping` takes it. What it computes is
    traced by compilers, so it is written in torch operations, without a look at values.
    """

    #: What `Options(mapping=...)` calls it.
    name: ClassVar[str]

    #: Whether rows and columns of the matrices sum to one (the columns of sinkhorn nearly so).
    doubly_stochastic: ClassVar[bool] = True

    #: Whether `iterations` changes the matrices.
    iterative: ClassVar[bool] = False

    def check(self, n: int) -> None:
        """Raises OptionError for a number of streams that the family does not have."""

    def logits(self, n: int) -> int:
        """How many logits H_res takes: columns of phi beside the 2 n of pre and post."""
        raise NotImplementedError

    def init_preserve(self, n: int) -> Tensor:
        """Static logits [K_res], float32, of a start that is row-stochastic, close to the identity, and still learns."""
        raise NotImplementedError

    def init_random(self, n: int) -> Tensor:
        """Static logits [K_res], float32, of a model that is trained from random projections: 0 here, which mixes evenly."""
        return torch.zeros(self.logits(n))

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:
        """The matrices [..., n, n] of logits [..., K_res]; index -2 is the new stream, index -1 the old one."""
        raise NotImplementedError

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Gradient [..., K_res] with respect to the logits, given the gradient [..., n, n] of the matrices.

        Here: of `matrix` as it is written, which is computed again for it. Whoever overrides it
            with a derivation by hand saves that.
        """
        from mhc_compile._torch.autograd import autograd_inside_operators

        with autograd_inside_operators():
            leaf = logits.detach().requires_grad_()
            matrix = self.matrix(leaf, n, iterations)
            if not matrix.requires_grad:  # it does not depend on the logits
                return torch.zeros_like(logits)
            return torch.autograd.grad(matrix, leaf, grad)[0]

    def flops(self, n: int, iterations: int) -> int:  # noqa: ARG002
        """Floating-point operations of `matrix` for one token.

        Here: a guess, two for every pair of an entry and a logit.
        """
        return 2 * n * n * self.logits(n)

    def reject(self, n: int, those: str) -> OptionError:
        """The error of `check`: which numbers of streams there are instead of `n`."""
        return OptionError(
            f"mapping {self.name!r} has no matrices for {n} streams, only for {those}; choose another 'streams', or mapping 'sinkhorn'"
        )
