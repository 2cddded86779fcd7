"""How far an optimizer can move the gates of hyper-connections in a training of a given length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhc_compile.config.options import ResolvedOptions

#: Where logits can move by less, streams may hardly part. In `examples/stability` they ended .07 of
#: their mean apart with a reach of 2.4 (main, the paper's start), .35 with 15 (main, the default),
#: and .74 with 37 (long, the paper's start).
NEEDED = 10.0


@dataclass(frozen=True)
class Reach:
    """How far the logits of pre, post and H_res can move in a training, at the slowest site.

    AdamW moves a number by about the learning rate at each step, so in a training by at most Σ lr,
    whatever the gradient. A logit is `s b + c a Σ_i z_i phi_i` with the gate_speed s and the
    scale_speed c, and the nC numbers z_i have magnitude 0.8 on average: b moves it by up to s Σ lr,
    phi by 0.8 c a nC Σ lr. At the start c a is the init_gain. Other optimizers have other bounds.
    """

    total: float  #: Σ lr at most: the peak learning rate times the steps
    static: float  #: of a logit, by its bias
    token: float  #: of a logit, by phi; 0 for static coefficients

    @property
    def enough(self) -> bool:
        """Whether the gates can move far enough to make a difference."""
        return self.static + self.token >= NEEDED

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "enough": self.enough}


def reach(sites: Iterable[tuple[int, ResolvedOptions]], lr: float, steps: int) -> Reach | None:
    """Return the reach of the site that can move least, None without one that has such logits.

    Args:
        sites: width C and options of each.
        lr: the peak learning rate.
        steps: the number of optimizer steps.
    """
    total = lr * steps
    found = []
    for width, options in sites:
        if not options.rank:
            features = options.streams * width
            gain = options.init_gain if options.token_dependent else 0.0
            found.append(Reach(total, options.speeds[0] * total, 0.8 * gain * features * total))
    return min(found, key=lambda one: one.static + one.token, default=None)
