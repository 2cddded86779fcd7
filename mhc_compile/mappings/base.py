"""What a residual mapping is: logits in, a mixing matrix out, and the logits it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mapping"]


class Mapping(Protocol):
    """A family of matrices H_res. `n` is the number of streams, K_res = `logits(n)`.

    Implementations are stateless; one instance serves every site. Values are float32 or float64.
    """

    @property
    def name(self) -> str:
        """What `options={"mapping": ...}` takes."""
        ...

    def logits(self, n: int) -> int:
        """How many logits H_res takes: columns of phi beside the 2 n of pre and post."""
        ...

    def start(self, n: int) -> Tensor:
        """Static logits [K_res], float32, of a start that is row-stochastic, close to the identity, and still learns."""
        ...

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:
        """The matrices [..., n, n] of logits [..., K_res]."""
        ...

    def backward(self, grad: Tensor, logits: Tensor, n: int, iterations: int) -> Tensor:
        """Gradient [..., K_res] with respect to the logits, given the gradient [..., n, n] of the matrices."""
        ...
