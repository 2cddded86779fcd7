"""Guards of Dynamo: compiled versions of a plain model must not run for one on streams."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from torch._dynamo import convert_frame
from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts
from torch._guards import Guard, TracingContext

from mhc_compile._torch.dynamo import forget_compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import Node

_lock = threading.Lock()


def guard_on_forward_pre_hooks() -> None:
    """Make compiled versions depend on modules having no forward pre-hook, as traced.

    By default (`skip_nnmodule_hook_guards`) Dynamo assumes that none is added later. A version that
    any backend compiled of a plain model would then run for the model with hyper-connections, and
    for others of its class. Versions without the guard are traced again at their next call.
    """
    with _lock:
        original = GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT
        if original.__module__ == __name__:
            return

        @functools.wraps(original)
        def guard_on_hooks(self: GuardBuilder, guard: Any) -> None:
            if guard.name.endswith("_forward_pre_hooks"):
                self.SEQUENCE_LENGTH(guard)
            else:
                original(self, guard)

        guard_on_hooks.__module__ = __name__
        GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT = guard_on_hooks  # type: ignore[method-assign]
        for reference in list(convert_frame.input_codes.seen):
            code = reference()
            if code is not None:
                forget_compiled(code, all_entries=False)


def guard_on_input(node: Node, check: Callable[[Tensor], bool]) -> None:
    """Make the version that is being compiled depend on `check` of an input tensor of the graph."""
    source: Any = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is not None:  # or the tensor is no input of the frame
        TracingContext.get().guards_context.dynamo_guards.add(Guard(source, _InputGuard(check)))


class _InputGuard:
    """What Dynamo calls to create a guard."""

    def __init__(self, check: Callable[[Tensor], bool]) -> None:
        self.check = check
        self.__name__, self.__code__ = check.__name__, check.__code__  # by which Dynamo sorts

    def __call__(self, builder: Any, guard: Guard) -> None:
        text = get_verbose_code_parts(f"{self.__name__}({guard.name})", guard)
        builder.get_guard_manager(guard).add_lambda_guard(self.check, text, guard.user_stack)
