"""Verdicts: every candidate is a site, or is rejected with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Node

    from mhc_compile.passes.analysis.provenance import ModuleRef
    from mhc_compile.passes.lifting.trunk_path import TrunkPath


class Reason(Enum):
    """Why an addition is not rewritten. The value is the code that reports print.

    Attributes:
        meaning: what the code says about the addition.
        example: code that gets it.
        remedy: what the user can do; "nothing" where the addition is no residual add, or where
            streams must end.
    """

    _value_: str
    meaning: str
    example: str
    remedy: str

    def __new__(cls, code: str, meaning: str, example: str, remedy: str) -> Reason:
        """Return a member whose value is `code`."""
        member = object.__new__(cls)
        member._value_ = code
        member.meaning, member.example, member.remedy = meaning, example, remedy
        return member

    BROADCAST = (
        "broadcast",
        "The terms have different shapes, and the one of full shape is no residual trunk of the others: a bias, a mask, a position table.",
        "`scores + mask`, `linear(x) + bias`, `x + positions`",
        "nothing: no residual add",
    )
    DTYPE = (
        "dtype",
        "The sum is complex, or a term has no known shape.",
        "rotary positions in complex numbers",
        "nothing: no residual add",
    )
    TENSOR_SUBCLASS = (
        "tensor-subclass",
        "The trunk is a tensor subclass that has no streams: it is jagged, or lacks an operation that they need.",
        "`x + f(x)` for nested tensors",
        "pad the tensors, or pack them into one with a mask",
    )
    NO_FEATURE_AXIS = (
        "no-feature-axis",
        "The tensors have fewer than two axes: a loss, a bias, a norm.",
        "`loss + penalty`",
        "nothing: no residual add",
    )
    DYNAMIC_WIDTH = (
        "dynamic-width",
        "The size of the feature axis is symbolic; phi needs a number.",
        "features on a symbolic axis",
        "give the axis a fixed size, or do not mark it as dynamic",
    )
    SAME_VALUE = ("same-value", "A value is added to itself.", "`x + x`", "nothing: no residual add")
    INDEPENDENT = (
        "independent",
        "No term depends on another: embeddings that are summed, experts that are accumulated, two encoders that meet.",
        "token and position embeddings, `q·cos + rot(q)·sin`, experts, gates `t f(x) + (1 - t) x`",
        "nothing: no residual add",
    )
    NOT_DIFFERENTIABLE = (
        "not-differentiable",
        "One term depends on the other, but only through shapes, integers or detached values.",
        "straight-through `x + (q - x).detach()`, `x + noise(x.shape)`",
        "nothing: no gradient would reach the projections",
    )
    NO_CONTRACTION = (
        "no-contraction",
        (
            "One term depends on the other by operations without weights alone: a polynomial such as tanh-GELU's, a gate, a rotation, "
            "the state of a recurrence."
        ),
        "tanh-GELU, GRN, the state of a linear recurrence",
        "nothing: no residual add",
    )
    TOKEN_SHIFT = (
        "token-shift",
        (
            "The terms are the same value at different places of a token axis (slices, pads, rolls), and contractions are in "
            "their gates alone: tokens are mixed with their neighbours, and nothing maps their features."
        ),
        "nanochat's smear, `x[:, 1:] + gate(x) * x[:, :-1]`",
        "nothing: no residual add",
    )
    PROJECTED_SKIP = (
        "projected-skip",
        (
            "The skip is a projection of what the branch reads (a convolution, a linear layer), or resizes its features: a chain ends "
            "before such a merge, and the next one starts from its sum."
        ),
        "`conv(x) + f(x)` where a ResNet stage begins, channels padded with zeros",
        "nothing: one chain ends here and another begins",
    )
    MULTI_STREAM = (
        "multi-stream",
        "The skip is mixed by a product whose factors both depend on the data: the model has residual streams of its own.",
        "DeepSeek-V4, `mix(x) @ streams + post · f(x)`",
        "nothing: the model has hyper-connections of its own",
    )
    SIDE_ADD = (
        "side-add",
        (
            "A residual add of its own inside the branch of another one, whose sum goes no further on that trunk: a D-skip, a bias "
            "computed from the input. Also one whose skip runs through trunk operations that another chain carries."
        ),
        "Mamba's `y + D x`, `f(x + adapter(x))`",
        "nothing: a lone site would mix nothing",
    )
    LONG_SKIP = (
        "long-skip",
        (
            "A trunk value is added to the same trunk some sites later (a U-net, the sum of all hidden states). It stays an addition, "
            "and the chain runs through it: every stream gets the old value."
        ),
        "`x + skips.pop()` of a U-net, `x + 0.1 x0`",
        "nothing: every stream gets the old value",
    )
    REWRITTEN = (
        "rewritten",
        "The branch holds streams of an earlier run of the passes, which rejected the add then.",
        "any of these, in a graph that was rewritten before",
        "nothing: the earlier run decided",
    )
    FEATURE_AXIS = (
        "feature-axis",
        (
            "Neither the way in which the branch reads the trunk nor the way in which its last product leaves it tells which axis "
            "holds the features."
        ),
        "a branch that tears the features apart",
        "normalise or project the features before they are torn apart",
    )
    MUTATED_OPERAND = (
        "mutated-operand",
        "The skip or the sum is written in place, and the old or the new value may be read under another name.",
        "`x[:, 0] = 0` on a trunk value",
        "write `x = torch.cat(...)` or `torch.where(...)` instead",
    )
    BROKEN_BRANCH = (
        "broken-branch",
        (
            "The branch ran outside this graph, and what it read of the trunk was not the beginning of a branch in any other: streams "
            "cannot be read there."
        ),
        "a branch that Python reads the trunk for, outside of any graph",
        "let a compiled module read it first",
    )
    NO_OWNER = (
        "no-owner",
        "The add is performed outside every module, so there is nobody to own the parameters.",
        "an add in a function that is compiled by itself",
        "put it into a module's `forward`",
    )
    NO_CARRIER = (
        "no-carrier",
        (
            "No module call inside this graph can declare the parameters: the branch is written with parameters of the compiled "
            "function's own module."
        ),
        "`x + x @ self.weight` in the compiled module",
        "put the weight into a module of its own (`nn.Linear`)",
    )
    NOT_DECLARED = (
        "not-declared",
        "The module was attached, but the tracer did not see the declaration of its parameters.",
        "hooks of the branch's module were removed",
        "`mhc_compile.detach(model)`, and compile again",
    )
    WIDTH_CONFLICT = (
        "width-conflict",
        "The same module performs another site with another width; one set of parameters cannot serve both.",
        "one module called with two widths",
        "use a module for each width",
    )
    CHAIN_TOO_SHORT = (
        "chain-too-short",
        "The chain has fewer sites than `min_chain_length`. Streams that are merged after every block compute what the plain model does.",
        "one residual add between two projections",
        "`min_chain_length=1`, if streams that merge at once are wanted",
    )
    FAILED = (
        "rewrite-failed",
        "An exception was raised while the chain was rewritten, or the graph with its streams compiled. The log has it.",
        "an operation that the inner compiler supports on the trunk, but not on streams",
        "please report it; `strict=True` makes it an error",
    )


@dataclass(frozen=True, eq=False)
class Site:
    """One residual add `x + f(x)`, or a sum of several branches (`x + attention(x) + mlp(x)`).

    Nodes belong to the normalised graph: `trunk -> shortcut -> skip`, `trunk -> branch ->
    branch_outputs`, and `add = skip + sum(branch_outputs)`. In most models the skip is the trunk
    itself, and the shortcut is empty.
    """

    #: The last add of the sum. Its value is the trunk after the site.
    add: Node
    #: All adds that the sum is made of, `add` last.
    adds: tuple[Node, ...]
    #: x, the trunk value that the branch reads.
    trunk: Node
    #: The operation after which the trunk value is complete: itself, or the last write into it.
    ready: Node
    #: The term of the sum that comes from no branch: x, or the value of the shortcut.
    skip: Node
    #: The operations from the trunk to the skip, which run on the streams.
    shortcut: TrunkPath
    #: The other terms of the sum: f(x), one or more.
    branch_outputs: tuple[Node, ...]
    #: The operations that depend on the trunk and lead to a branch output.
    branch: frozenset[Node]
    #: The last contraction of the branch. Its module names the site.
    last_contraction: Node
    #: C.
    width: int
    #: The axis of the sum that holds the features: the last in a transformer, 1 in a convolutional
    #: network.
    axis: int
    #: The module that performs the site, and whose submodule the hyper-connection becomes.
    owner: ModuleRef
    #: Path of the branch below the owner: "attn", "mlp", "blocks.3".
    name: str
    #: The module called in the graph, whose pre-hook declares the parameters to the tracer.
    declaring_module: ModuleRef
    #: Whether the branch began in another graph (see `split_branches`). Then `branch` is empty, and
    #: the coefficients arrive as inputs.
    tail: bool = False
    #: The planner's caller may note the modules that begin the branch; the passes do not read it.
    heads: tuple[Any, ...] = ()

    @property
    def path(self) -> str:
        """Where the parameters live, below the traced root: "transformer.h.0.mhc.attn"."""
        return ".".join(part for part in (self.owner.path, "mhc", self.name) if part)

    def __str__(self) -> str:
        return f"site {self.path}"


@dataclass(frozen=True, eq=False)
class Rejection:
    """A candidate that stays as it is. `message` is built only when it is read."""

    add: Node
    reason: Reason
    explain: Callable[[], str] = field(repr=False)
    #: Path of the module that performs the add.
    module_path: str = ""
    #: The other adds of the same sum, where a site of several adds was rejected as a whole.
    inner: tuple[Node, ...] = ()

    @property
    def adds(self) -> tuple[Node, ...]:
        """All adds that this verdict is about."""
        return (*self.inner, self.add)

    @property
    def message(self) -> str:
        """What was found, as a sentence for reports."""
        return self.explain()

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.message}"
