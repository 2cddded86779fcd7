"""Give the instances of a class their hyper-connections when their constructor returns.

What a program does afterwards (optimizer groups, DDP, FSDP, averages, lists for clipping, strict
loading) then finds ordinary parameters. A subclass is another class: its constructor is not done
when that of its base class returns, and its structure may differ.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mhc_compile.attachment.model_tree import connections
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.plan import Plan
from mhc_compile.compilation.pipeline import run_on_streams
from mhc_compile.config.options import Options
from mhc_compile.errors import AttachError, PlanError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import nn

    from mhc_compile.config.options import ResolvedOptions


def planned(
    plan: Plan | str | os.PathLike[str], *, options: Mapping[str, Any] | Options | None = None
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorate a model's class: its instances have hyper-connections from construction on.

        @mhc_compile.planned("mhc.json")
        class GPT(nn.Module): ...

    They are compiled in place as well, so that they run on streams wherever they are called:
    `model(x)`, `torch.compile(model)` with this backend, methods such as `generate`.

    Args:
        plan: a plan, or its file; see `mhc_compile.plan`.
        options: as for `torch.compile(model, backend="mhc", options=options)`.

    Raises:
        OptionError: the options are wrong.
        PlanError: the file is no plan, it contradicts the options, or it is for other classes. A
            constructor raises AttachError for an instance that the plan does not fit.
    """
    parsed, loaded = Options.parse(options), plan if isinstance(plan, Plan) else Plan.load(plan)
    loaded.check_options(parsed)

    def decorate(kind: type[nn.Module]) -> type[nn.Module]:
        if not loaded.matching(kind):
            known = ", ".join(dict.fromkeys(model.kind for model in loaded.models))
            raise PlanError(f"the plan is for {known}; got {kind.__qualname__}. Decorate the class that was planned")

        def fail(_: nn.Module, sentence: str) -> None:
            raise AttachError(sentence)

        give_at_construction(kind, loaded, parsed, fail)
        return kind

    return decorate


def give_at_construction(
    kind: type[nn.Module],
    plan: Plan,
    options: ResolvedOptions,
    misfit: Callable[[nn.Module, str], None],
    given: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Make constructors of `kind` attach the plan; `misfit(model, why)` where it does not fit.

    `given(model)` is called after attaching.
    """
    # A dataclass gets its constructor later, and only if the class has none; this is the end of it.
    name = "__post_init__" if "__init__" not in vars(kind) and hasattr(kind, "__post_init__") else "__init__"
    plain = getattr(kind, name)

    @functools.wraps(plain)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if type(self) is not kind or connections(self):
            return
        reasons = []
        for model in plan.matching(kind):
            reason = model.misfit(self)
            if reason is None:
                model.apply(self, options)
                settle()
                run_on_streams(self, options, compiled=True)
                given(self)
                return
            reasons.append(reason)
        misfit(
            self,
            f"the plan does not fit this {kind.__qualname__}: {reasons[0]}. Make the plan again for this model, or"
            " build the one that was planned",
        )

    setattr(kind, name, construct)
