"""Parameters, FLOPs, bytes, memory and expected overhead of a shape, from the cost model of `mhc explain`.

A decoder is the same block over and over: its work is that of one block and one more for each that follows. So models of one and of two blocks are
traced on the meta device, and the rest is multiplication:

    work(L) = work(1) + (L − 1) · (work(2) − work(1))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.inspection.cost import Cost, site_cost
from mhc_compile.inspection.explain.explain import explain
from mhc_compile.inspection.roofline import Overhead, Work, overheads
from mhc_compile.tools.scaling.kept import kept_bytes
from mhc_compile.tools.scaling.model import Decoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.inspection.explain.results import Explanation
    from mhc_compile.tools.scaling.shapes import Shape

__all__ = ["Estimate", "estimate"]

#: Bytes of an element of trunk and streams: bfloat16.
ITEM = 2


@dataclass(frozen=True)
class Estimate:
    """What hyper-connections add to one shape.

    Attributes:
        shape: the sizes.
        sites: residual adds.
        parameters: of the plain model, counted from its shape.
        active: those of them that one token runs through.
        cost: of all sites; per token and forward pass, but for its parameters.
        plain: one forward pass of the plain model over one sequence.
        added: what the sites do beyond their plain adds in such a pass, as they are lowered now.
        floor: the same, if every site moved no more bytes than it must.
        kept: bytes per token that all sites keep for the backward beyond what the plain model keeps, by the option `recompute`.
    """

    shape: Shape
    sites: int
    parameters: int
    active: int
    cost: Cost
    plain: Work
    added: Work
    floor: Work
    kept: Mapping[str, int]

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """On known machines: a roofline estimate (see `mhc_compile.inspection.roofline`)."""
        return overheads(self.plain, self.added, self.floor)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shape"}
        plain = {name: asdict(value) if isinstance(value, Cost | Work) else value for name, value in values.items()}
        shares = [
            {"machine": one.machine.name, "here": one.here, "many_tokens": one.many_tokens, "floor": one.floor}
            for one in self.overheads
        ]
        return {"shape": asdict(self.shape), **plain, "kept": dict(self.kept), "overheads": shares}


def estimate(shape: Shape, options: Options | None = None) -> Estimate:
    """Traces two small versions of `shape` without memory for their weights, and scales them to its depth.

    Args:
        shape: the sizes.
        options: of the backend. Sites are taken alike: options of single sites are an error.

    Raises:
        OptionError: `options.overrides` is given.
    """
    options = Options.parse(options)
    one, two = (_explained(shape, layers, options) for layers in (1, 2))
    cost = site_cost(shape.width, ITEM, options)
    sites = 2 * shape.layers
    whole = cost.times(sites)
    assert one.plain is not None
    assert two.plain is not None
    return Estimate(
        shape=shape,
        sites=sites,
        parameters=shape.parameters(),
        active=shape.parameters(active=True),
        cost=Cost(**{**asdict(whole), "parameters": sites * cost.parameters}),
        plain=_scaled(one.plain, two.plain, shape.layers),
        added=_scaled(one.added, two.added, shape.layers),
        floor=_scaled(one.floor, two.floor, shape.layers),
        kept={name: kept_bytes(shape.width, ITEM, options, sites, name) for name in ("cheap", "block")},
    )


def _explained(shape: Shape, layers: int, options: ResolvedOptions) -> Explanation:
    with torch.device("meta"):
        model = Decoder(shape, layers).to(torch.bfloat16)
        ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
    return explain(model, ids, options=options)


def _scaled(one: Work, two: Work, layers: int) -> Work:
    def along(name: str) -> int:
        first, second = getattr(one, name), getattr(two, name)
        return int(first + (layers - 1) * (second - first))

    return Work(along("flops"), along("activations"), along("weights"))
