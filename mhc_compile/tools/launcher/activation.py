"""Sets the default backend in a Python below `mhc run`, once torch is imported."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile._torch import program
from mhc_compile._torch.default_backend import install_default_backend
from mhc_compile.compilation.observers import observe
from mhc_compile.compilation.run_settings import default_options
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import MhcError, OptionError, warn
from mhc_compile.integrations.accelerate import accept_backends
from mhc_compile.tools.launcher.models import compile_every_model, follow_plan, restore_before_loading
from mhc_compile.tools.launcher.plan_recorder import PlanRecorder
from mhc_compile.tools.launcher.report_counter import ReportCounter
from mhc_compile.tools.launcher.run_config import RunConfig
from mhc_compile.tools.launcher.training import TrainingReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from torch import fx

_counter: ReportCounter | None = None
_recorder: PlanRecorder | None = None


def activate(torch: ModuleType, config: str, after: Callable[[str, Callable[[ModuleType], None]], Any]) -> None:
    """Make mhc the default backend of `torch.compile`, and count its graphs, once.

    `config` is the value of the environment variable; `after(name, then)` calls `then(module)` once
    the module `name` has been imported.
    """
    global _counter, _recorder
    if _counter is not None:
        return
    parsed = RunConfig.load(config)
    _counter = ReportCounter(parsed)
    observe(_counter.count)
    options = dict(parsed.options)
    if parsed.plan_output is not None:
        _recorder = PlanRecorder(parsed.plan_output, _counter.why_nothing)
        observe(_recorder.observe)
        options["inner_backend"] = _recorder.run
    default = DefaultBackend(options)
    default_options.update(options)
    install_default_backend(torch, default, after, replace_inductor=parsed.replace_inductor)
    if parsed.compile:
        compile_every_model(default)
    if parsed.plan is not None:
        follow_plan(parsed.plan, Options.parse(options), _counter.add_model)
    restore_before_loading(options, _counter.add_model)
    training = TrainingReport(_counter.models, _counter.add_training)
    after("safetensors.torch", lambda module: program.after_saving_safetensors(module, training.after_saving))
    distributed = "torch.distributed.checkpoint.default_planner"
    after(distributed, lambda module: program.after_saving_distributed(module, training.after_saving))
    after("accelerate.utils.dataclasses", accept_backends)


def report_at_exit() -> None:
    """Report what was rewritten in all; called at the end of the process."""
    if _recorder is not None:
        _recorder.end()
    elif _counter is not None:
        _counter.report_total()


class DefaultBackend:
    """The backend of a `torch.compile` that names none.

    The options that the script gives to `torch.compile` are settings for Inductor, as without it;
    those in `options`, of the backend mhc, override them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.__name__ = "mhc"  # what Dynamo calls it
        self.takes_whole_graphs = True  # see `mhc_compile.backend`

    def __call__(
        self,
        graph_module: fx.GraphModule,
        inputs: list[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile a graph, as `mhc_compile.mhc` does.

        Raises:
            OptionError: `options` has something that is no setting of Inductor.
        """
        from mhc_compile.backend import mhc

        try:
            merged = self._merge(options or {}, mode)
        except MhcError as error:
            _torch.raise_through_dynamo(error)
            raise
        return mhc(graph_module, inputs, options=merged, mode=mode)

    def _merge(self, settings: Mapping[str, Any], mode: str | None) -> ResolvedOptions:
        options = Options.parse(self.options)
        given = {name.replace("-", "_"): value for name, value in settings.items()}  # Inductor takes both spellings
        known = _torch.inductor_settings() if given else []
        for name in set(given) - set(known):
            near = difflib.get_close_matches(name, known, n=1)
            ours = f" mhc run takes it as a flag: --{name.replace('_', '-')}." if name in Options.names() else ""
            raise OptionError(
                f"torch.compile(..., options={dict(settings)!r}) names no backend, so its options are settings for"
                f" Inductor, and {name!r} is none.{f' Did you mean {near[0]!r}?' if near else ''}{ours}"
            )
        if options.inner_backend != "inductor" and (given or mode):
            unused = f"mode={mode!r}" if mode else f"options={dict(settings)!r}"
            warn(
                f"torch.compile(..., {unused}) is for Inductor; with inner_backend={options.inner_backend!r} it has no"
                " effect"
            )
        return replace(options, inductor={**given, **options.inductor})
