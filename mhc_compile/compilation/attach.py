"""`mhc_compile.attach` and `plan`: hyper-connections before the first compiled call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.plan import Plan
from mhc_compile.attachment.sites import detach
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.fallback import leave_failing_plain, report
from mhc_compile.compilation.messages import warn_nothing_rewritten
from mhc_compile.compilation.pipeline import run_on_streams
from mhc_compile.compilation.session import GraphSession
from mhc_compile.config.options import Options
from mhc_compile.distributed.guards import check_unwrapped
from mhc_compile.errors import AttachError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch
    from torch import nn

    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.modules.hyper_connection import HyperConnection


def attach(
    model: nn.Module,
    *args: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> dict[str, HyperConnection]:
    """Attach hyper-connections before the first compiled call, without running the model.

    The model is traced with the example inputs and may live on the meta device. With a plan nothing
    is traced, and there are no inputs. Use this where parameters must exist early: before an
    optimizer is built, a checkpoint is loaded, or DDP or FSDP wraps the model.

    Args:
        model: any module, or one that `torch.compile` returned.
        *args: example inputs, as for `model(*args, **kwargs)`.
        plan: a plan, or its file; see `mhc_compile.plan`.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Returns:
        All hyper-connections of the model by path, old and new.

    Raises:
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs.
        NothingRewrittenError: no residual add was found, and `strict` is set.
        RewriteError: an exception keeps residual adds from being rewritten, and `strict` is set.
        AttachError: an existing hyper-connection contradicts the options, the plan does not fit, or
            the model is already wrapped in DDP or sharded by FSDP.
        PlanError: the file is no plan, or it contradicts the options.
    """
    parsed = Options.parse(options)
    target = unwrap(model)
    check_unwrapped(target)
    if plan is not None:
        if args or kwargs:
            raise AttachError("mhc_compile.attach takes a plan or example inputs; got both")
        (plan if isinstance(plan, Plan) else Plan.load(plan)).apply(target, parsed)
        settle()
        run_on_streams(target, parsed)
        return connections(target)
    sessions: list[GraphSession] = []

    def on_graph(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        session = GraphSession.analyze(graph_module, inputs, parsed)
        leave_failing_plain(session)
        session.attach()
        report(session)
        sessions.append(session)
        return session.annotations()

    capture(target, args, kwargs, on_graph)
    if not any(session.plan.sites or session.faults for session in sessions):
        rejections = [rejection for session in sessions for rejection in session.plan.rejections]
        warn_nothing_rewritten(rejections, parsed, [session.graph for session in sessions])
    run_on_streams(target, parsed)
    return connections(target)


def plan(model: nn.Module, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any) -> Plan:
    """Return where the hyper-connections of `model` belong, as a file for other processes.

        mhc_compile.plan(model, batch).save("mhc.json")
        ...
        mhc_compile.attach(model, plan="mhc.json")  # another process: nothing is traced

    The model is traced as by `attach`, and has no hyper-connections afterwards. One that has some
    is only read, and needs no inputs.

    Args:
        model: any module, or one that `torch.compile` returned.
        *args: example inputs, as for `model(*args, **kwargs)`.
        options: as for `torch.compile(model, backend="mhc", options=options)`. The plan keeps those
            that determine the parameters.
        **kwargs: example inputs by name.

    Raises:
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs.
        AttachError: the model has no residual add that can be rewritten.
    """
    if connections(model):
        return Plan.of(model)
    settings = replace(Options.parse(options), existing_optimizers="ignore")
    try:
        attach(model, *args, options=settings, **kwargs)
        return Plan.of(model)
    finally:
        detach(model)
