"""Guards of Dynamo: compiled versions of a plain model must not run for one that declares sites."""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch._dynamo import convert_frame
from torch._dynamo.guards import GuardBuilder

from mhc_compile._torch.dynamo import forget_compiled

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
