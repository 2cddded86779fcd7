"""Parameters, FLOPs, bytes, memory and overhead of a shape, from the cost model of `mhc explain`.

The blocks of a decoder are alike, so models of one and of two blocks are traced on the meta device,
and the rest is multiplication:

    work(L) = work(1) + (L − 1) · (work(2) − work(1))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.inspection.cost import Cost, Work, site_cost
from mhc_compile.inspection.explain.explain import explain
from mhc_compile.inspection.roofline import Overhead, overheads
from mhc_compile.mappings import get_mapping
from mhc_compile.ops.lazy_reference import LONGEST
from mhc_compile.passes.transforms.recompute import block_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.config.options import Recompute
    from mhc_compile.tools.scaling.shapes import Shape

#: Bytes of an element of trunk and streams (bfloat16), and of a coefficient (float32).
_BFLOAT16, _FLOAT32 = 2, 4


def _linear(inwards: int, outwards: int) -> nn.Linear:
    return nn.Linear(inwards, outwards, bias=False)


class _Block(nn.Module):
    """Causal attention, grouped or latent, and a gated branch as wide as the experts of one token.

    Positions are left out: they move few bytes and cost few products.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        values, keys, hidden = s.heads * s.head, (s.groups or s.heads) * s.head, s.active * s.hidden
        self.norm1, self.norm2 = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        if s.latent:
            self.query_down = _linear(s.width, s.query_latent) if s.query_latent else nn.Identity()
            self.query = _linear(s.query_latent or s.width, s.heads * (s.head + s.rotary))
            self.key_down, self.key_up = _linear(s.width, s.latent + s.rotary), _linear(s.latent, 2 * values)
        else:
            self.query, self.key, self.value = (_linear(s.width, size) for size in (values, keys, keys))
        self.out = _linear(values, s.width)
        self.gate, self.up, self.down = _linear(s.width, hidden), _linear(s.width, hidden), _linear(hidden, s.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._latent if self.shape.latent else self._grouped)(self.norm1(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]

    def _grouped(self, x: Tensor) -> tuple[Tensor, ...]:
        s, linears = self.shape, (self.query, self.key, self.value)
        q, k, v = (linear(x).unflatten(-1, (-1, s.head)).transpose(1, 2) for linear in linears)
        if s.groups and (share := s.heads // s.groups) > 1:
            k, v = (one.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) for one in (k, v))
        return q, k, v

    def _latent(self, x: Tensor) -> tuple[Tensor, ...]:
        s = self.shape
        q = self.query(self.query_down(x)).unflatten(-1, (s.heads, -1)).transpose(1, 2)
        small, position = self.key_down(x).split([s.latent, s.rotary], -1)
        k, v = self.key_up(small).unflatten(-1, (s.heads, -1)).transpose(1, 2).chunk(2, -1)
        return q, torch.cat([k, position.unsqueeze(1).expand(-1, s.heads, -1, -1)], -1), v


class Decoder(nn.Module):
    """The plain decoder with so many layers: ids int64 [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(shape.vocabulary, shape.width), _linear(shape.width, shape.vocabulary)
        self.blocks = nn.Sequential(*(_Block(shape) for _ in range(layers)))
        self.norm = nn.RMSNorm(shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.norm(self.blocks(self.embed(ids))))  # type: ignore[no-any-return]


def parameters(shape: Shape, *, active: bool = False) -> int:
    """Count the weights of the plain model without norms and routers; `active`: of one token."""
    with torch.device("meta"):
        model = Decoder(shape, shape.layers)
    matrices = sum(one.numel() for one in model.parameters() if one.dim() == 2)
    idle = 0 if active else (shape.layers - shape.dense) * (shape.experts - shape.active)
    return matrices + idle * 3 * shape.width * shape.hidden


def kept_bytes(
    width: int, itemsize: int, options: ResolvedOptions, sites: int, recompute: Recompute, device: str = "cuda"
) -> int:
    """Return the bytes per token that a chain of sites keeps beyond the plain model.

    The plain model keeps the input of every branch's norm, of width C, and its result. A site keeps
    its branch's output instead of the first, its coefficients, and n streams, of which those before
    the chain are one. With `recompute="block"` only the first step of every
    `sqrt(n L / (n + 2))` keeps streams and coefficients (arXiv 2512.24880 v2, section 4.3), and
    the others compute the result of the norm again. Else streams are lazy, which are written before
    the end of a chain on CUDA, where up to four may be.
    """
    n, steps, again = options.streams, sites - 1, 0
    written = steps // LONGEST["cpu"] if device == "cpu" else ceil(steps / (LONGEST["cuda"] if n <= 4 else 1))
    if recompute == "block":
        written = ceil(steps / block_length(sites, n))
        again = steps - written
    logits = get_mapping(options.mapping).logits(n)
    # pre, post, res; the projection, one over the root mean square, moments of the norm
    coefficients = _FLOAT32 * (2 * n + n * n + 2 * n + logits + 1 + 2)
    return (1 + n * written - again) * width * itemsize + (sites - again) * coefficients


@dataclass(frozen=True)
class Estimate:
    """The cost of hyper-connections for one shape."""

    shape: Shape  # the sizes
    sites: int  # residual adds
    parameters: int  # of the plain model
    active: int  # those of them that one token uses
    cost: Cost  # of all sites; per token and forward pass, except its parameters
    plain: Work  # one forward pass of the plain model over one sequence
    added: Work  # work of the sites beyond their plain adds in such a pass, as lowered now
    floor: Work  # the same, if every site moved no more bytes than it must
    kept: Mapping[str, int]  # bytes per token that all sites keep beyond the plain model, by option `recompute`

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """Roofline estimates for known machines (see `mhc_compile.inspection.roofline`)."""
        return overheads(self.plain, self.added, self.floor)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        names = ("here", "many_tokens", "floor")
        shares = [{"machine": o.machine.name, **{name: getattr(o, name) for name in names}} for o in self.overheads]
        return {**asdict(self), "overheads": shares}


def estimate(shape: Shape, options: Options | None = None) -> Estimate:
    """Trace models of one and two blocks without memory for their weights, and scale them in depth.

    Raises:
        OptionError: `options.overrides` is given; all sites have the same options here.
    """
    options = Options.parse(options)
    works = []
    for layers in (1, 2):
        with torch.device("meta"):
            model, ids = Decoder(shape, layers).to(torch.bfloat16), torch.zeros(1, shape.tokens, dtype=torch.int64)
        found = explain(model, ids, options=options)
        assert found.plain is not None
        works.append((found.plain, found.added, found.floor))
    plain, added, floor = (_scaled(one, two, shape.layers) for one, two in zip(*works, strict=True))
    cost, sites = site_cost(shape.width, _BFLOAT16, options), 2 * shape.layers
    cost = replace(cost.times(sites), parameters=sites * cost.parameters)
    weights = (parameters(shape), parameters(shape, active=True))
    kept = {name: kept_bytes(shape.width, _BFLOAT16, options, sites, name) for name in ("cheap", "block")}
    return Estimate(shape, sites, *weights, cost, plain, added, floor, kept)


def _scaled(one: Work, two: Work, layers: int) -> Work:
    pairs = ((getattr(one, field.name), getattr(two, field.name)) for field in fields(Work))
    return Work(*(int(first + (layers - 1) * (second - first)) for first, second in pairs))
