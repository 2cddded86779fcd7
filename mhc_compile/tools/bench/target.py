"""A user's own model, timed: plain and with hyper-connections, compiled and plain once more in eager, in the same rounds."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.text import Text
from torch.utils import _pytree as pytree

from mhc_compile._torch import isolated_compile
from mhc_compile.errors import CaptureError
from mhc_compile.inspection.explain.explain import explain
from mhc_compile.tools.bench.conditions import load
from mhc_compile.tools.bench.load import busy_cores
from mhc_compile.tools.bench.measure import fill, prepare
from mhc_compile.tools.bench.names import PLAIN
from mhc_compile.tools.bench.result import Benchmark, Row
from mhc_compile.tools.bench.rounds import interleave
from mhc_compile.tools.bench.table import tables
from mhc_compile.tools.bench.workload import Workload
from mhc_compile.tools.demo.inductor import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console, ConsoleOptions, RenderableType
    from torch import nn

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.reporting.progress import Silent

__all__ = ["TargetResult", "TargetWorkload", "measure_target"]

_LR = 1e-4
_WARM_UP = 2


class TargetWorkload(Workload):
    """One training step of a model on its example inputs: the mean square of its outputs, gradients, AdamW. In eval mode, a forward alone.

    Args:
        call: the model as it is called.
        model: the module itself.
        args: example inputs.
        kwargs: example inputs by name.
    """

    def __init__(
        self, call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        device = next((tensor.device.type for tensor in model.parameters()), "cpu")
        super().__init__(device)
        self._call, self._args, self._kwargs = call, args, kwargs
        self._train = model.training and any(parameter.requires_grad for parameter in model.parameters())
        # Before the first call, as scripts do; what the backend adds to the model then joins it.
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=_LR) if self._train else None

    def forward(self) -> Any:
        """The loss; the outputs in eval mode."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, (self._args, self._kwargs))
        with torch.set_grad_enabled(self._train):
            leaves = pytree.tree_leaves(self._call(*args, **kwargs))
            if not self._train:
                return leaves
            losses = [leaf.square().mean() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            return torch.stack([loss.float() for loss in losses]).sum()

    def backward(self, outputs: Any) -> None:
        """From the loss; nothing in eval mode."""
        if self._train:
            outputs.backward()

    def finish(self) -> None:
        """AdamW."""
        if self._optimizer is not None:
            self._optimizer.step()

    def clear(self) -> None:
        """No contender carries its gradients through the turns of the others."""
        if self._optimizer is not None:
            self._optimizer.zero_grad()


@dataclass(frozen=True)
class TargetResult:
    """What was measured.

    Attributes:
        target: as it was named.
        model: class name.
        sites: that are rewritten.
        train: whether steps were timed, or forwards.
        benchmark: its rows are those of `bench.result`.
        torch: version.
        threads: of torch.
        load: of the machine, one minute's average, before and after.
        interrupted: Ctrl-C ended the rounds early.
    """

    target: str
    model: str
    sites: int
    train: bool
    benchmark: Benchmark
    torch: str
    threads: int
    load: tuple[float, float]
    interrupted: bool

    @property
    def failed(self) -> bool:
        """Whether a contender raised."""
        return any(row.status == "failed" for row in self.benchmark.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields, rows as `bench.result` documents them."""
        return {"schema": "mhc-compile/bench-target/1", **asdict(self)}

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        yield self._view(options.max_width)

    def _view(self, width: int) -> RenderableType:
        what = "training step: forward, backward, AdamW" if self.train else "forward pass"
        rounds = f"{self.benchmark.rounds} round{'s' * (self.benchmark.rounds != 1)}"
        parts: list[RenderableType] = [Text(f"{self.model}, {self.sites} sites; one {what}; {rounds}", style="italic")]
        parts += tables(self.benchmark, width)
        parts.append(
            Text(
                "total: median (quartiles). × plain: of the same rounds. per site: (this − plain) / sites. compile: the first forward and"
                " backward, from empty caches unless --quick.",
                style="dim",
            )
        )
        parts += [Text(f"{row.name}: {row.message}", style="red") for row in self.benchmark.rows if row.message]
        parts.append(
            Text(
                f"torch {self.torch}, {self.threads} threads; load {self.load[0]:.1f} before, {self.load[1]:.1f} after"
            )
        )
        if self.interrupted:
            parts.append(Text("Interrupted: complete rounds only.", style="yellow"))
        return Group(*parts)


def measure_target(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ResolvedOptions,
    *,
    rounds: int,
    busy: bool,
    cold: bool,
    progress: Silent,
) -> TargetResult:
    """Times copies of `model`; it stays as it is.

    Args:
        name: of the target, for the result.
        model: in the mode that is to be timed.
        args: example inputs.
        kwargs: example inputs by name.
        options: of the backend.
        rounds: every contender once in each.
        busy: keep every core busy with something else.
        cold: compile from empty caches.
        progress: is told what goes on.

    Raises:
        CaptureError: the model is on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"{name} is on the meta device and cannot be run; leave --full-size away")
    before = load()
    progress.phase("loading the compiler")
    warm_up()  # whoever is first would pay for it
    sites = len(explain(model, *args, options=options, **kwargs).sites)
    compilers: dict[str, tuple[str, Callable[[nn.Module], Callable[..., Any]]]] = {
        PLAIN: ("plain residual, Inductor", lambda own: isolated_compile(own, "inductor")),  # type: ignore[arg-type]
        "ours": (
            'torch.compile(backend="mhc")',
            lambda own: torch.compile(own, backend="mhc", options=options.to_dict()),
        ),
        "eager": ("plain residual, eager", lambda own: own),
    }
    rows: dict[str, Row] = {}
    workloads: dict[str, Workload] = {}
    for contender, (title, compiler) in compilers.items():
        progress.phase(f"compiling {contender}")

        def build(compiler: Callable[[nn.Module], Callable[..., Any]] = compiler) -> tuple[nn.Module, Workload]:
            own = copy.deepcopy(model)
            return own, TargetWorkload(compiler(own), own, args, kwargs)

        rows[contender], workload = prepare(Row(name=contender, title=title, status="missing"), build, cold=cold)
        if workload is not None:
            workloads[contender] = workload
    progress.timing("step" if model.training else "forward", (rounds + _WARM_UP) * len(workloads))
    with busy_cores(busy):
        measured = interleave(workloads, rounds, _WARM_UP, progress.advance)
    filled = fill(rows, workloads, measured, sites=max(1, sites), whole=True)
    return TargetResult(
        name,
        type(model).__name__,
        sites,
        model.training,
        Benchmark("step", measured.complete, filled),
        torch.__version__,
        torch.get_num_threads(),
        (before, load()),
        measured.interrupted,
    )
