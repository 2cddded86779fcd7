"""`ReadOut`: the parameters of the learned end of a chain."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mhc_compile import ops as _ops  # noqa: F401 - registers the operators
from mhc_compile.config.coefficient_spec import parse
from mhc_compile.modules.state_dict import LoadsPartially


class ReadOut(LoadsPartially):
    """The learned read-out: a sum of the streams with weights that depend on the token.

    Two forms (see `mhc_compile.ops.gated_reference`), by the rank of the convention:

        rank 0   weight [n C, n], bias [n], scale [1]       a weight per stream: DeepSeek-V4, HY-V4
        rank r   weight [n C, r], norm [n C], up [r, n C]   a weight per channel: Qwen4-Exp

    It is a submodule of the last site of the chain: `layers.3.mhc.mlp.read_out`.

    Args:
        width: C.
        streams: n.
        spec: the convention, as a string.
        eps: added to the mean square under the root mean square.
        init: "preserve" for the mean of the streams, "random" for a random projection. With a rank
            it is always random.
        init_gain: initial value of `scale`.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    #: The parameters of the two forms.
    NAMES: ClassVar[dict[bool, tuple[str, str, str]]] = {
        False: ("weight", "bias", "scale"),
        True: ("weight", "norm", "up"),
    }

    def __init__(
        self,
        width: int,
        streams: int,
        *,
        spec: str,
        eps: float,
        init: str,
        init_gain: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.width, self.streams, self.spec, self.eps, self.init = width, streams, spec, eps, init
        self.rank = parse(spec).rank
        self.names = self.NAMES[self.rank > 0]
        self._init_gain = init_gain
        empty: dict[str, Any] = {"device": device, "dtype": dtype}
        features = streams * width
        self.weight = nn.Parameter(torch.empty(features, self.rank or streams, **empty))
        if self.rank:
            self.norm = nn.Parameter(torch.empty(features, **empty))
            self.up = nn.Parameter(torch.empty(self.rank, features, **empty))
        else:
            self.bias = nn.Parameter(torch.empty(streams, **empty))
            self.scale = nn.Parameter(torch.empty(1, **empty))
        self.reset_parameters()

    def start(self) -> dict[str, Tensor]:
        """Return the start: the mean of the streams, or random projections of unit variance."""
        features = self.streams * self.width
        weight = torch.zeros(self.weight.shape, dtype=self.weight.dtype)
        if self.random_start:
            weight.normal_(std=features**-0.5)
        if self.rank:
            up = torch.empty(self.up.shape, dtype=self.up.dtype).normal_(std=self.rank**-0.5)
            return {"weight": weight, "norm": torch.zeros(features), "up": up}
        bias = torch.zeros(self.streams, dtype=torch.float64)
        if self.init != "random":
            # For n = 1 it would be the logit of 1.
            share = min(1.0 / self.streams, 1.0 - 1e-7) - parse(self.spec).pre_eps
            bias = torch.logit(torch.full((self.streams,), share, dtype=torch.float64))
        return {"weight": weight, "bias": bias, "scale": torch.full((1,), self._init_gain)}

    def forward(self, streams: Tensor) -> Tensor:
        """Return [..., C] of streams [..., n, C], in their dtype.

        Raises:
            ShapeError: the streams do not fit n and C.
        """
        if self.rank:
            return torch.ops.mhc.gated_read_out(streams, self.weight, self.norm, self.up, self.eps)  # type: ignore[no-any-return]
        pre_eps = parse(self.spec).pre_eps
        return torch.ops.mhc.read_out(streams, self.weight, self.bias, self.scale, pre_eps, self.eps)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"width={self.width}, streams={self.streams}, form={self.spec}"
