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
from mhc_compile.compilation import run_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from mhc_compile.attachment.plan import ModelPlan
    from mhc_compile.compilation.session import GraphSession


class PlanRecorder:
    """Collects the models that a script compiles, and writes their plan to `file`."""

    def __init__(self, file: str, why_nothing: Callable[[], str]) -> None:
        self.file, self._why_nothing = file, why_nothing
        self._before = self._written()
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        run_settings.planning = True
        program.on_backward(self.finish)
        register_optimizer_step_pre_hook(lambda *_: self._before_step())

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

    def finish(self) -> NoReturn:
        """Write the plan, if there is one, and end the process."""
        plans = self._plans()
        if not plans:
            self._end(f"mhc plan: no plan was written: {self._why_nothing()}", 1)
        from mhc_compile.attachment.plan import merge

        if os.environ.get("RANK", "0") == "0":
            plan = merge(plans)
            plan.save(self.file)
            models = ", ".join(f"{model.kind} ({len(model.connections)} hyper-connections)" for model in plan.models)
            self._end(f"mhc plan: {self.file}: {models}", 0)
        self._end("", 0)

    def _before_step(self) -> None:
        if self._plans():  # else a closure may call the model
            self.finish()

    def end(self) -> None:
        """Write the plan at the end of the script, unless a child has done so."""
        if self._written() == self._before:
            self.finish()

    def _written(self) -> int:
        return os.stat(self.file).st_mtime_ns if os.path.exists(self.file) else 0

    def _plans(self) -> list[ModelPlan]:
        """Return the plans of all models, each of the smallest module that can be called."""
        if not self._roots:
            return []  # nothing is imported at the exit of a script that failed early
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
