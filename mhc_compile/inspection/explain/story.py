"""The full story of single adds, as data: what `mhc_compile.why` returns. `storytelling` makes it from a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Operation", "RejectionStory", "SiteStory", "Story", "Weight"]


@dataclass(frozen=True)
class Operation:
    """One operation of the graph.

    Attributes:
        node: its name in the graph.
        op: what it does: "linear", "add".
        value: shape and dtype of its result, "" where that is no tensor.
        module: path of the innermost module that performs it; "" is the model itself.
        product: whether it is a product, a convolution, attention or a recurrence.
        source: `file:line` in the model's code, "" if the tracer did not record it.
    """

    node: str
    op: str
    value: str
    module: str
    product: bool
    source: str


@dataclass(frozen=True)
class Weight:
    """One parameter that a site has or will have."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteStory:
    """An add that becomes a hyper-connection.

    Attributes:
        path: where its parameters are.
        adds: the additions that it is made of, the last one gives the sum.
        code: that line of the model's code, "" if it cannot be read.
        trunk: x, which the branch reads.
        trunk_from: where it comes from.
        skip: what the branch is added to: x, or what `shortcut` makes of it.
        shortcut: the operations from x to the skip, which run on the streams.
        branch: f, in order; empty where the branch began in another graph.
        width: C.
        axis: the axis of the sum that holds the features.
        axis_from: who told.
        owner: path of the module that gets the hyper-connection, and `owner_kind` its class.
        owner_because: why it is this module.
        carrier: path of the module whose call shows the parameters to the tracer.
        carrier_because: why it is that module.
        parameters: with their shapes.
        chain: the number of its chain in this graph, counted from 1.
        index: its position there, counted from 0, of `sites`.
        previous: path of the site before it in the chain, "" for the first.
        following: path of the site behind it, "" for the last.
        lifted: the operations between the site before and this one, which run on the streams.
        stream: the stream that the branch leans to at the start, None with `init="random"`, which prefers none.
    """

    path: str
    adds: tuple[Operation, ...]
    code: str
    trunk: Operation
    trunk_from: str
    skip: Operation
    shortcut: tuple[Operation, ...]
    branch: tuple[Operation, ...]
    width: int
    axis: int
    axis_from: str
    owner: str
    owner_kind: str
    owner_because: str
    declaring_module: str
    carrier_because: str
    parameters: tuple[Weight, ...]
    chain: int
    index: int
    sites: int
    previous: str
    following: str
    lifted: tuple[Operation, ...]
    stream: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be asked for by, beside its source line and the modules around it."""
        return (self.path, *(add.node for add in self.adds))


@dataclass(frozen=True)
class RejectionStory:
    """An add that stays as it is.

    Attributes:
        adds: the additions that the verdict is about.
        code: the line of the model's code, "" if it cannot be read.
        module: path of the module that performs the add.
        terms: what is added.
        reason: the code of the reason.
        sentence: what was found here.
        meaning: what the reason says.
        example: where it is met.
        remedy: what can be done.
        nearest: the verdict on the nearest other add of the same module, "" if there is none.
    """

    adds: tuple[Operation, ...]
    code: str
    module: str
    terms: tuple[Operation, ...]
    reason: str
    message: str
    meaning: str
    example: str
    remedy: str
    nearest: str

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be asked for by, beside its source line and the modules around it."""
        return tuple(add.node for add in self.adds)


@dataclass(frozen=True)
class Story:
    """The adds that a name stands for. Print it with rich, or read the fields.

    Attributes:
        asked: the name.
        sites: those that become hyper-connections, in graph order.
        rejections: those that stay as they are.
    """

    asked: str
    sites: tuple[SiteStory, ...]
    rejections: tuple[RejectionStory, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from mhc_compile.inspection.explain.story_report import render

        return render(self)

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)
