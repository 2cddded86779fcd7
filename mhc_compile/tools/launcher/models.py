"""The models of a program below `mhc run`: planned, loaded from a checkpoint, or never compiled."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mhc_compile._torch import program
from mhc_compile.config.options import Options
from mhc_compile.errors import AttachError, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import fx, nn

    from mhc_compile.config.options import ResolvedOptions

log = logging.getLogger(__name__)


def follow_plan(file: str, options: ResolvedOptions, given: Callable[[nn.Module], None]) -> None:
    """Give the instances of planned classes their hyper-connections as they are constructed.

    `given(model)` is called for each.

    Raises:
        PlanError: the file is no plan, or it contradicts the options.
    """
    from mhc_compile.attachment.plan import Plan
    from mhc_compile.construction.planned_class import give_at_construction

    plan = Plan.load(file)
    plan.check_options(options)
    kinds = {model.kind for model in plan.models}
    said: set[str] = set()

    def misfit(model: nn.Module, sentence: str) -> None:
        if type(model).__module__.startswith("torch.nn."):
            return  # any Sequential; the last report says if no model met the plan
        if options.strict:
            raise AttachError(sentence)
        if sentence not in said:
            said.add(sentence)
            warn(f"{sentence}. Without it, hyper-connections come at the first compiled call")

    def meet(kind: type[nn.Module]) -> None:
        if kind.__qualname__ in kinds:
            give_at_construction(kind, plan, options, misfit, given)

    program.on_new_class(meet)


def restore_before_loading(options: Mapping[str, Any], given: Callable[[nn.Module], None]) -> None:
    """Give a plain model the hyper-connections of the checkpoint that it loads."""

    def restore_missing(model: nn.Module, state: Mapping[str, Any]) -> None:
        if not any(".mhc." in str(name) or str(name).startswith("mhc.") for name in state):
            return
        from mhc_compile.attachment.model_tree import connections
        from mhc_compile.attachment.plan import planned_root
        from mhc_compile.checkpoints.reader import read_connections
        from mhc_compile.checkpoints.restore import restore
        from mhc_compile.compilation.pipeline import run_on_streams

        if connections(model) or not read_connections(state):
            return
        try:
            restore(model, state, options=options)
        except AttachError as error:
            warn(f"a checkpoint with hyper-connections is loaded, and they do not fit: {error}")
            return
        root = planned_root(model)
        run_on_streams(root, Options.parse(options), compiled=True)
        given(root)

    program.before_loading(restore_missing)


def compile_every_model(backend: Callable[[fx.GraphModule, list[Any]], Any]) -> None:
    """Compile every outermost module in place at its first call, if it has several layers."""

    def decide(module: nn.Module) -> None:
        layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        if len(layers) > 1:
            from mhc_compile import _torch

            _torch.set_compiled_call(module, _torch.compile_call(module, backend))

    program.on_construction(lambda module: program.call_first(module, decide))
