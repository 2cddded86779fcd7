"""`mhc plan train.py`: run a script until its models have made their first call, and stop it.

The first call attaches hyper-connections, as without a plan. The process ends, without exit
handlers, before the first backward or optimizer step, or before a model is called again.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mhc_compile._torch import program

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from mhc_compile.attachment.plan import ModelPlan
    from mhc_compile.compilation.session import GraphSession


class PlanRecorder:
    """Collects the models that a script compiles, and writes their plan to `file`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        program.before_backward(self.finish)
        register_optimizer_step_pre_hook(lambda *_: self.finish())

    def observe(self, session: GraphSession) -> None:
        """Record the model of a graph."""
        if session.provenance.root is not None:
            self._roots.add(session.provenance.root)

    def run(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG002
        """Return the graph as it is; the second call of a whole model ends the process."""
        from mhc_compile.capture.frame import read_frame

        frame = read_frame()
        whole = not frame.is_part and not any(call.module is not frame.root for call in frame.calls)
        calls = 0

        def call(*values: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1 and whole:
                self.finish()
            return graph_module(*values)

        return call

    def finish(self) -> None:
        """Write the plan and end the process; go on if no model was compiled yet."""
        plans = self._plans()
        if not plans:
            return
        from mhc_compile.attachment.plan import merge

        if os.environ.get("RANK", "0") == "0":
            plan = merge(plans)
            plan.save(self.file)
            models = ", ".join(f"{model.kind} ({len(model.connections)} hyper-connections)" for model in plan.models)
            self._end(f"mhc plan: {self.file}: {models}", 0)
        self._end("", 0)

    def report_nothing(self, reason: str) -> None:
        """Say at the end of the script that there is no plan."""
        if not self._plans():
            self._end(f"mhc plan: no plan was written: {reason}", 1)
        self.finish()

    def _plans(self) -> list[ModelPlan]:
        """Return the plans of all models, each of the smallest module that can be called."""
        from mhc_compile.attachment.model_tree import connections
        from mhc_compile.attachment.plan import ModelPlan, planned_root

        wanted = {part for root in self._roots for part in connections(root).values()}
        if not wanted:
            return []
        # A model may be compiled block by block: its plan is that of the module around them.
        living = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]  # not of proxies
        inner = {id(child) for module in living for child in module.children()}
        tops = [module for module in living if id(module) not in inner and wanted & set(connections(module).values())]
        roots = {planned_root(top) for top in tops}
        roots = {one for one in roots if not any(one is not other and other in one.modules() for other in roots)}
        return [ModelPlan.of(root) for root in sorted(roots, key=lambda root: type(root).__qualname__)]

    def _end(self, message: str, code: int) -> NoReturn:
        sys.stdout.flush()
        if message and sys.__stderr__ is not None:
            sys.__stderr__.write(f"{message}\n")
            sys.__stderr__.flush()
        os._exit(code)
