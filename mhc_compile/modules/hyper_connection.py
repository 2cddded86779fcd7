"""`HyperConnection`: the parameters of one site, and their use by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import ops as _ops  # noqa: F401 - registers the operators
from mhc_compile._torch import state_metadata
from mhc_compile.config.coefficient_spec import parse
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError
from mhc_compile.mappings import get_mapping
from mhc_compile.modules.readout import ReadOut
from mhc_compile.modules.state_dict import NAMES, SETTINGS, LoadsPartially, explain_misfits

if TYPE_CHECKING:
    from collections.abc import Callable

#: Logit of the only pre weight when n = 1, where `sum(pre) = 1` is a saturated sigmoid: 1 - 1.1e-7.
_SATURATED = 16.0


def parameter_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype of a site's parameters: float64 for a float64 trunk value, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


class HyperConnection(LoadsPartially):
    """A residual add as a hyper-connection: `X' = H_res X + H_postᵀ f(H_pre X)`.

    Source: arXiv 2512.24880 v2, equations 5 to 9, or the preset. Shapes, with `K = 2 n + n²` for
    Sinkhorn and streams [..., n, C]:

        phi    [n C, K]   projection of the flattened, rms-normalised streams; columns pre (n),
                          post (n), residual (n², row-major)
        bias   [K]        static logits
        scale  [3]        a_pre, a_post, a_res

    With token_dependent=False phi is [n C, 0] and scale [0]: coefficients depend on bias alone.
    Coefficients are computed in float32 or wider, whatever the dtype of the streams.

    A state dict without hyper-connections, that of a plain model, is loaded with a warning, and the
    parameters here do not change; one with only some of them, or with other shapes, is an error
    (see `mhc_compile.load_state_dict`).

    Args:
        width: C, the width of the residual stream.
        options: number of streams, mapping, init and so on; defaults to `Options()`.
        index: position of the site in its chain. With init="preserve" the branch leans to stream
            `index mod n`.
        last: whether the site ends its chain. With read_out="learned" it then has a submodule
            `read_out`, a `ReadOut`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        OptionError: `width` is not a positive integer.
    """

    names: tuple[str, str, str] = NAMES

    phi: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter

    def __init__(
        self,
        width: int,
        options: Options | None = None,
        *,
        index: int = 0,
        last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(
                f"HyperConnection: width is {width!r}; expected a positive integer, the size of the feature axis"
            )
        options = Options.parse(options)
        self.width = width
        self.streams = options.streams
        self.index = index
        self.preset = options.preset
        self.spec = options.spec
        self.mapping = options.mapping
        self.iterations = options.iterations
        self.eps = options.eps
        self.token_dependent = options.token_dependent
        self.rank = options.rank
        self.single_pass = options.single_pass
        self.end = options.read_out
        self.init = options.init
        self._init_gain = options.init_gain
        self._init_stream_weight = options.init_stream_weight
        self._create(device=device, dtype=dtype)
        self.read_out: ReadOut | None = None
        if last:
            self.end_chain()
        self.reset_parameters()

    def _create(self, **empty: Any) -> None:
        n = self.streams
        columns = 2 * n + get_mapping(self.mapping).logits(n)
        self.phi = nn.Parameter(torch.empty(n * self.width, columns if self.token_dependent else 0, **empty))
        self.bias = nn.Parameter(torch.empty(columns, **empty))
        self.scale = nn.Parameter(torch.empty(3 if self.token_dependent else 0, **empty))

    @property
    def lacks_end(self) -> bool:
        """Whether the learned read-out is missing that the last site of this chain needs."""
        return self.end == "learned" and not self.single_pass and self.read_out is None

    def end_chain(self) -> bool:
        """Add the learned read-out if the options ask for one; return whether it was missing."""
        if not self.lacks_end:
            return False
        like = {"device": self.phi.device, "dtype": self.phi.dtype}
        settings = {"spec": self.spec, "eps": self.eps, "init": self.init, "init_gain": self._init_gain}
        self.read_out = ReadOut(self.width, self.streams, **settings, **like)  # type: ignore[arg-type]
        return True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the init of the options.

        "preserve": phi = 0, scale > 0, pre sums to 1 and leans to one stream, post = 1, H_res near
        the identity. With equal streams this is the plain residual add, in value and in every
        gradient of the original parameters, and phi receives a gradient from the first step.
        "random": phi ~ N(0, 1/(n C)), so that `z` has unit variance; bias 0, hence pre = 1/2, post
        = 1 and uniform mixing (under "unconstrained" the identity).
        """
        n, convention = self.streams, parse(self.spec)
        self.scale.fill_(self._init_gain)
        self.bias.zero_()
        if self.init == "random":
            nn.init.normal_(self.phi, std=(n * self.width) ** -0.5)
            self._init_mixing(get_mapping(self.mapping).init_random(n))
            return
        self.phi.zero_()
        if n == 1:
            self.bias[0] = _SATURATED
        else:
            weights = torch.full((n,), (1.0 - self._init_stream_weight) / (n - 1), dtype=torch.float64)
            weights[self.index % n] = self._init_stream_weight
            self.bias[:n] = torch.logit(weights - convention.pre_eps).to(self.bias)
        post = torch.tensor((1.0 - convention.post_eps) / convention.post_range, dtype=torch.float64)
        self.bias[n : 2 * n] = torch.logit(post).to(self.bias)
        self._init_mixing(get_mapping(self.mapping).init_preserve(n))

    def _init_mixing(self, logits: Tensor) -> None:
        if logits.numel():
            self.bias[2 * self.streams :] = logits.to(self.bias)

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(pre [..., n], post [..., n], res [..., n, n])` for streams [..., n, C].

        Raises:
            ShapeError: the streams do not fit n and C.
        """
        pre, post, res, _ = torch.ops.mhc.coefficients(
            streams, self.phi, self.bias, self.scale, self.spec, self.iterations, self.eps
        )
        return pre, post, res

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return new streams [..., n, C]; `branch` is a function of [..., C]."""
        pre, post, res = self.coefficients(streams)
        out = branch(torch.ops.mhc.collapse(streams, pre))
        return torch.ops.mhc.update(streams, out, post, res)  # type: ignore[no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = state_metadata(destination)
        if metadata is not None:
            metadata.setdefault(prefix.removesuffix("."), {}).update({name: getattr(self, name) for name in SETTINGS})

    def _check_loaded(self, *args: Any) -> None:
        explain_misfits(self, *args)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        static = "" if self.token_dependent else ", static"
        return f"width={self.width}, streams={self.streams}, mapping={self.spec}, iterations={self.iterations}{static}"
