"""`torch.export`: what follows a trace of a model."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from torch.export import _trace

from mhc_compile._torch.calls import inside_export

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.export import ExportedProgram

_lock = threading.Lock()


def after_exporting(then: Callable[[nn.Module, ExportedProgram], ExportedProgram]) -> None:
    """Patch `torch.export.export` to return what `then` makes of a model and its program."""
    with _lock:
        original = _trace._export
        if original.__module__ == __name__:
            return

        @functools.wraps(original)
        def export(model: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
            token = inside_export.set(True)
            try:
                program = original(model, *args, **kwargs)
            finally:
                inside_export.reset(token)
            return then(model, program)

        export.__module__ = __name__
        _trace._export = export
