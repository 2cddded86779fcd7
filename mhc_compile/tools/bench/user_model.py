"""The benchmark of a user's model: plain and rewritten under Inductor, and plain in eager."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile._torch import isolated_compile
from mhc_compile._torch.benchmarking import warm_up
from mhc_compile._torch.fx import tree_leaves, tree_map_only
from mhc_compile.errors import CaptureError
from mhc_compile.inspection.explain.explain import explain
from mhc_compile.reporting.conditions import load_average
from mhc_compile.tools.bench.candidates import PLAIN
from mhc_compile.tools.bench.measure import prepare, time_rows
from mhc_compile.tools.bench.results import Row, TargetResult
from mhc_compile.tools.bench.workloads import ForwardWorkload, StepWorkload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.bench.workloads import Workload


def _workload(call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Workload:
    """Return a training step on the mean square of the outputs, or in eval mode a forward pass."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")

    def outputs() -> Any:
        own_args, own_kwargs = tree_map_only(torch.Tensor, torch.Tensor.clone, (args, kwargs))
        return call(*own_args, **own_kwargs)

    def loss() -> torch.Tensor:
        leaves = [leaf for leaf in tree_leaves(outputs()) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        return torch.stack([leaf.square().mean().float() for leaf in leaves]).sum()

    if model.training and any(parameter.requires_grad for parameter in model.parameters()):
        return StepWorkload(device, loss, model, (), fused=None)
    return ForwardWorkload(device, outputs)


def measure_target(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ResolvedOptions,
    *,
    rounds: int,
    cold: bool,
    progress: Silent,
) -> TargetResult:
    """Time copies of `model` in its mode, on example inputs; `cold` compiles from empty caches.

    Raises:
        CaptureError: the model is on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"{name} is on the meta device and cannot be run; leave out --full-size")
    before = load_average()
    progress.phase("loading the compiler")
    warm_up()
    sites = len(explain(model, *args, options=options, **kwargs).sites)
    ours = partial(torch.compile, backend="mhc", options=options.to_dict())
    compilers: dict[str, tuple[str, Callable[[nn.Module], Callable[..., Any]]]] = {
        PLAIN: ("plain residual, Inductor", lambda own: isolated_compile(own, "inductor")),  # type: ignore[arg-type]
        "ours": ('torch.compile(backend="mhc")', ours),
        "eager": ("plain residual, eager", lambda own: own),
    }

    def build(compiler: Callable[[nn.Module], Callable[..., Any]]) -> tuple[nn.Module, Workload]:
        own = copy.deepcopy(model)
        return own, _workload(compiler(own), own, args, kwargs)

    rows = {key: Row(name=key, title=title, status="missing") for key, (title, _) in compilers.items()}
    builds = {key: partial(build, compiler) for key, (_, compiler) in compilers.items()}
    kind = "step" if model.training else "forward"
    workloads = prepare(rows, builds, cold=cold, progress=progress)
    benchmark, interrupted = time_rows(kind, rows, workloads, rounds=rounds, sites=max(1, sites), progress=progress)
    machine = (torch.__version__, torch.get_num_threads(), (before, load_average()))
    return TargetResult(name, type(model).__name__, sites, model.training, benchmark, *machine, interrupted)
