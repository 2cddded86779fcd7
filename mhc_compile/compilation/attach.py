"""`mhc_compile.attach`: create hyper-connections before the first compiled call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.messages import warn_nothing_rewritten
from mhc_compile.compilation.session import GraphSession
from mhc_compile.config.options import Options
from mhc_compile.distributed.guards import check_unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.modules.hyper_connection import HyperConnection


def attach(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any
) -> dict[str, HyperConnection]:
    """Attach hyper-connections before the first compiled call, without running the model.

    The model is traced with the example inputs and may live on the meta device. Use this where
    parameters must exist early: before an optimizer is built, a checkpoint is loaded, or DDP or
    FSDP wraps the model.

    Args:
        model: any module, or one that `torch.compile` returned.
        *args: example inputs, as for `model(*args, **kwargs)`.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Returns:
        All hyper-connections of the model by path, old and new.

    Raises:
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs.
        NothingRewrittenError: no residual add was found, and `strict` is set.
        AttachError: an existing hyper-connection contradicts the options, or the model is already
            wrapped in DDP or sharded by FSDP.
    """
    parsed = Options.parse(options)
    target = unwrap(model)
    check_unwrapped(target)
    sessions: list[GraphSession] = []

    def on_graph(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        session = GraphSession.analyze(graph_module, inputs, parsed)
        session.attach()
        sessions.append(session)
        return session.annotations()

    capture(target, args, kwargs, on_graph)
    if not any(session.plan.sites for session in sessions):
        rejections = [rejection for session in sessions for rejection in session.plan.rejections]
        warn_nothing_rewritten(rejections, parsed, [session.graph for session in sessions])
    return connections(target)
