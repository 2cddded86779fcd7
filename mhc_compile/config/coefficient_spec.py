"""`Convention`: how a system computes its coefficients, as one value and as a string. Torch-free.

The operators take the string (`str mapping`): "sinkhorn" is the paper's convention, and settings
that differ from it are appended: "sinkhorn;pre_eps=1e-06;sinkhorn_eps=1e-06". So a graph contains
all that it computes, and a kernel is built for one string.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Literal

from mhc_compile.errors import OptionError

Last = Literal["rows", "columns"]

#: The largest n. Every system that ships mHC uses 4; the mixing cost grows with n².
MAX_STREAMS = 8

#: The numbers of streams that each residual mapping supports; `register_mapping` adds to it. It is
#: not with the mappings, so that options are validated without importing torch.
STREAM_COUNTS: dict[str, tuple[int, ...]] = {
    "sinkhorn": tuple(range(1, MAX_STREAMS + 1)),
    "identity": tuple(range(1, MAX_STREAMS + 1)),
    "permutations": (1, 2, 3, 4),
    "kronecker": (1, 2, 4, 8),
    "unconstrained": tuple(range(1, MAX_STREAMS + 1)),
}


@dataclass(frozen=True, kw_only=True)
class Convention:
    """The equations of the coefficients, with z the projection of the streams and σ the sigmoid.

        pre  = σ(c a_pre z_pre + s b_pre) + pre_eps
        post = post_range σ(c a_post z_post + s b_post) + post_eps
        res  = mapping(c a_res z_res + s b_res)

    The defaults are those of arXiv 2512.24880 v2, equations 7 and 8, which have no c and s.

    Attributes:
        mapping: name of the residual mapping.
        pre_eps: added to pre, so that no stream is ever cut off.
        post_range: the largest post.
        post_eps: added to post.
        sinkhorn_eps: added to the entries after the first column step and to every sum that is
            divided by (DeepSeek-V4). With it rows sum to 1 - sinkhorn_eps rather than 1.
        last: the side of H_res that Sinkhorn normalises last, and whose sums are therefore exact.
        rank: rank of the gate of a read with a weight for every channel (Qwen4-Exp); 0 for a weight
            for every stream.
        gate_speed: s. It makes no other functions, as b can be s times as large instead: it makes
            an optimizer that moves every parameter by its learning rate, such as AdamW, move
            logits s times as far by b. The gradient of b is 1 / s of the derivative: the one that
            it would have with s = 1.
        scale_speed: c. Likewise for a, which then moves c times as far. The gradient of a is the
            derivative.
    """

    mapping: str = "sinkhorn"
    pre_eps: float = 0.0
    post_range: float = 2.0
    post_eps: float = 0.0
    sinkhorn_eps: float = 0.0
    last: Last = "rows"
    rank: int = 0
    gate_speed: float = 1.0
    scale_speed: float = 1.0

    def __str__(self) -> str:
        """Return the name of the mapping and the settings that are not the paper's, for `parse`."""
        paper = Convention(mapping=self.mapping)
        settings = [f.name for f in fields(self) if getattr(self, f.name) != getattr(paper, f.name)]
        return ";".join([self.mapping, *(f"{name}={getattr(self, name)}" for name in settings)])


@functools.cache
def parse(spec: str) -> Convention:
    """Return the convention of a string, the inverse of `str(convention)`.

    Raises:
        OptionError: an unknown setting, or a value that cannot be read.
    """
    mapping, *settings = spec.split(";")
    kinds: dict[str, type] = {f.name: type(getattr(Convention(), f.name)) for f in fields(Convention)}
    values: dict[str, object] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = kinds[name](value)
        except (KeyError, ValueError):
            known = ", ".join(name for name in kinds if name != "mapping")
            raise OptionError(
                f"convention {spec!r}: {setting!r} is no setting; expected NAME=VALUE with one of {known}"
            ) from None
    return Convention(mapping=mapping, **values)  # type: ignore[arg-type]
