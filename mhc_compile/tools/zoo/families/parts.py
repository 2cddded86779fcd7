"""Layers, blocks and networks that the handwritten families are built from."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.family import Case, Expect, Family, per_layer

#: C of every handwritten family, and the size of its vocabulary.
WIDTH, VOCABULARY = 16, 31

Part: TypeAlias = Callable[[], Any]


@dataclass(frozen=True)
class Each:
    """A list of copies of a part: one for each layer of the network, or `count(layers)`."""

    part: Part
    count: Callable[[int], int] = int

    def __call__(self, layers: int) -> Any:
        return nn.ModuleList(self.part() for _ in range(self.count(layers)))


class Stack(Each):
    """A sequence of copies of a part, called as one module."""

    def __call__(self, layers: int) -> Any:
        return nn.Sequential(*(self.part() for _ in range(self.count(layers))))


class Block(nn.Module):
    """A module whose header lists its submodules and parameters: `class B(Block, norm=Norm)`.

    Each part is called without arguments, after the parts of the base class and in the order of the
    header. A network is a block that is given its depth, by which `Each` repeats its part.
    """

    parts: ClassVar[dict[str, Part | Each]] = {}

    def __init_subclass__(cls, **parts: Part | Each) -> None:
        super().__init_subclass__()
        cls.parts = {**cls.parts, **parts}

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        for name, part in self.parts.items():
            setattr(self, name, part(layers) if isinstance(part, Each) else part())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def formula(name: str, forward: Callable[..., Any], *, doc: str = "", **parts: Part | Each) -> type[Block]:
    """Return a class of blocks with this `forward(block, x)`, named like the family in camel case.

    Its docstring is `doc`, or that of `forward`.
    """
    title = "".join(word.capitalize() for word in name.removeprefix("trap-").split("-"))
    contents = {"__doc__": doc or forward.__doc__, "forward": forward}
    return types.new_class(title, (Block,), parts, lambda body: body.update(contents))


class Attention(nn.Module):
    """Attention in two heads of a sequence to itself, or to `memory`. `x: [B, T, C]`."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        # No bias for k: its gradient is zero in exact arithmetic, and rounding noise otherwise.
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (self.q(x), self.k(source), self.v(source)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU, after a norm by default."""

    def __init__(self, width: int = WIDTH, *, norm: bool = True) -> None:
        first = nn.LayerNorm(width) if norm else nn.Identity()
        super().__init__(first, nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


linear: Callable[..., Part] = partial(partial, nn.Linear)
conv2d: Callable[..., Part] = partial(partial, nn.Conv2d)
Norm, Square, Plain = partial(nn.LayerNorm, WIDTH), linear(WIDTH, WIDTH), partial(FeedForward, norm=False)
INTO, OUT = linear(8, WIDTH), linear(WIDTH, 4)


def parameter(value: float = 1.0, *shape: int) -> Callable[[], nn.Parameter]:
    """Return a function that makes a parameter with equal entries, [C] unless `shape` is given."""
    return lambda: nn.Parameter(torch.full(shape or (WIDTH,), value))


class Residual(Block, mlp=FeedForward):
    """`x + mlp(norm(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class TransformerBlock(Block, norm=Norm, attn=Attention, mlp=FeedForward):
    """`x + attention(norm(x))`, `x + mlp(norm(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Embedded(nn.Module):
    """A language model around blocks: token embedding, blocks, norm, head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), Norm(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Framed(nn.Module):
    """Blocks between a linear layer into the width and one out of it; all read the other inputs."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.into, self.blocks, self.out = INTO(), nn.ModuleList(blocks), OUT()

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x, *more)
        return self.out(x)


def ids() -> Tensor:
    """Return token ids [2, 6]."""
    return torch.arange(12).reshape(2, 6) * 5 % VOCABULARY


def tokens(block: Callable[[], nn.Module]) -> Callable[[int], Case]:
    """Return a function that makes a language model of so many blocks, called on token ids."""
    return lambda layers: (Embedded([block() for _ in range(layers)]), (ids(),), {})


def vectors(block: Callable[[], nn.Module], *more: tuple[int, ...]) -> Callable[[int], Case]:
    """Return a function that makes so many blocks in a frame, called on [2, 5, 8] and `more`."""
    return network(lambda layers: Framed([block() for _ in range(layers)]), (2, 5, 8), *more)


def network(body: Callable[[int], nn.Module], *shapes: tuple[int, ...]) -> Callable[[int], Case]:
    """Return a function that makes a network of so many layers, called on [2, 5, 8] or `shapes`."""
    return lambda layers: (body(layers), tuple(torch.randn(*shape) for shape in shapes or ((2, 5, 8),)), {})


def spelled(
    name: str, forward: Callable[..., Any], *more: tuple[int, ...], expected: Expect | None = None, **formed: Any
) -> Family:
    """Return the family of the blocks `formula(name, forward, **formed)`, called as in `vectors`.

    The structure is one chain of a site a layer unless `expected` is given.
    """
    return Family(name, vectors(formula(name, forward, **formed), *more), expected or per_layer(1))


def wired(
    name: str, forward: Callable[..., Any], *shapes: tuple[int, ...], expected: Expect | None = None, **formed: Any
) -> Family:
    """Return the family of networks `formula(name, forward, **formed)`, called as in `network`."""
    return Family(name, network(formula(name, forward, **formed), *shapes), expected or per_layer(1))
