"""What Inductor makes of a model, plain and rewritten: the kernels that it launches, and the operations that each of them holds."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.config.options import Options
from mhc_compile.errors import CaptureError, OptionError
from mhc_compile.export.rewrite import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import RenderableType
    from torch import nn

__all__ = ["Kernel", "KernelDiff", "kernels", "read_kernels"]

Phase = Literal["forward", "backward"]
#: "fused": written by Inductor. "library": a product or another operation of a library. "mhc": a kernel of ours.
Kind = Literal["fused", "library", "mhc"]

_COMMENT = re.compile(r"# Topologically Sorted Source Nodes: \[(.*?)\], Original ATen: \[(.*?)\]")
_LAUNCH = re.compile(
    r"^(?:\w+ = )?((?:cpp|triton)_\w+(?=\(|\.run\()|extern_kernels\.\w+|(?:torch\.ops|aten)\.\w+(?:\.\w+)*)(?:\.run)?\("
)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        phase: of the step.
        kind: who wrote it.
        name: as Inductor calls it, without its number: "cpp_fused_native_layer_norm", "extern_kernels.addmm", "mhc.step".
        operations: the operations that are fused in it, as ATen names.
        nodes: the nodes of the graph that it computes.
    """

    phase: Phase
    kind: Kind
    name: str
    operations: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class KernelDiff:
    """The launches of one training step (or of one forward pass, for a model in eval mode), in order, plain and rewritten.

    Attributes:
        model: class name.
        before: of the plain model.
        after: of the rewritten one.
    """

    model: str
    before: tuple[Kernel, ...]
    after: tuple[Kernel, ...]

    def counts(self, phase: Phase) -> dict[Kind, tuple[int, int]]:
        """Launches before and after, by kind."""
        sides = [Counter(kernel.kind for kernel in side if kernel.phase == phase) for side in (self.before, self.after)]
        kinds: tuple[Kind, ...] = ("fused", "library", "mhc")
        return {kind: (sides[0][kind], sides[1][kind]) for kind in kinds}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {schema, model, before: [kernel], after: [kernel], counts: {phase: {kind: [before, after]}}}."""
        phases: tuple[Phase, ...] = ("forward", "backward")
        return {
            "schema": "mhc-compile/kernels/1",
            "model": self.model,
            "counts": {phase: {kind: list(pair) for kind, pair in self.counts(phase).items()} for phase in phases},
            "before": [asdict(kernel) for kernel in self.before],
            "after": [asdict(kernel) for kernel in self.after],
        }

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)

    def __rich__(self) -> RenderableType:
        from mhc_compile.inspection.diff.kernel_table import render

        return render(self)


def kernels(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> KernelDiff:
    """Compiles copies of `model` with Inductor, plain and with `backend="mhc"`, runs each once, forward and backward, and reads the code.

    Caches of compiled code are passed by, so this takes as long as compiling the model for the first time, twice.

    Args:
        model: any module, or an exported program. It stays as it is.
        *args: example inputs.
        options: of the backend; `inner_backend` must be "inductor".
        **kwargs: example inputs by name.

    Raises:
        OptionError: another `inner_backend`.
        CaptureError: the model has no memory to run in (the meta device).
    """
    parsed = Options.parse(options)
    if parsed.inner_backend != "inductor":
        raise OptionError(
            f"option 'inner_backend' is {parsed.to_dict()['inner_backend']!r}; kernels are those of 'inductor'"
        )
    if isinstance(model, ExportedProgram):
        plain, ours = model.module(), rewrite(model, options=parsed).module()
        args, kwargs = model.example_inputs or ((), {})
        compiled = [torch.compile(plain), torch.compile(ours)]
        name = "ExportedProgram"
    else:
        target = unwrap(model)
        if any(tensor.is_meta for tensor in (*target.parameters(), *target.buffers())):
            raise CaptureError(
                f"{type(target).__name__} is on the meta device and cannot be run; kernels need a model with weights"
            )
        compiled = [
            torch.compile(copy.deepcopy(target)),
            torch.compile(copy.deepcopy(target), backend="mhc", options=parsed.to_dict()),
        ]
        name = type(target).__name__
    before, after = (tuple(_launches(call, args, kwargs)) for call in compiled)
    return KernelDiff(name, before, after)


def _launches(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Kernel]:
    with torch.random.fork_rng(), _torch.inductor_code() as codes:
        args, kwargs = copy.deepcopy((args, kwargs))
        leaves = pytree.tree_leaves(call(*args, **kwargs))
        losses = [leaf.float().sum() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    for code in codes:
        yield from read_kernels(code)


def read_kernels(code: str) -> Iterator[Kernel]:
    """The launches in one module of Python that Inductor wrote, in order."""
    _, mark, body = code.partition("def call(")
    if not mark:
        return
    signature, _, _ = body.partition("args.clear()")
    phase: Phase = "backward" if "tangents_" in signature else "forward"
    about: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    for line in map(str.strip, body.splitlines()):
        comment = _COMMENT.search(line)
        if comment:
            about = _about(comment)
        elif line.startswith(("def ", "return ")):
            return
        elif launch := _LAUNCH.match(line):
            name = launch.group(1)
            nodes, operations = about
            yield Kernel(phase, _kind(name), _plain(name), operations or _operations(name), nodes)
            about = ((), ())


def _operations(name: str) -> tuple[str, ...]:
    """The operations in the name of a fused kernel, which joins them by underscores that they have themselves."""
    words = _plain(name).partition("_fused_")[2].lstrip("_").split("_")
    found: list[str] = []
    while words:
        length = next((n for n in range(len(words), 1, -1) if hasattr(torch.ops.aten, "_".join(words[:n]))), 1)
        found.append("_".join(words[:length]))
        words = words[length:]
    return tuple(filter(None, found))


def _about(comment: re.Match[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    nodes, operations = (tuple(filter(None, group.split(", "))) for group in comment.groups())
    return nodes, operations


def _kind(name: str) -> Kind:
    if name.startswith("torch.ops.mhc."):
        return "mhc"
    return "fused" if name.startswith(("cpp_", "triton_")) else "library"


def _plain(name: str) -> str:
    if name.startswith(("cpp_", "triton_")):
        return re.sub(r"_\d+$", "", name)
    return name.removeprefix("torch.ops.").removesuffix(".default")
