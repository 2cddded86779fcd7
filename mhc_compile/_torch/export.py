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

_export: Callable[..., ExportedProgram] = _trace._export
_lock = threading.Lock()


def after_exporting(then: Callable[[nn.Module, ExportedProgram], ExportedProgram]) -> None:
    """Patch `torch.export.export` to return what `then` makes of a model and its program."""
    with _lock:
        if _trace._export is not _export:
            return

        @functools.wraps(_export)
        def export(model: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
            token = inside_export.set(True)
            try:
                program = _export(model, *args, **kwargs)
            finally:
                inside_export.reset(token)
            return then(model, program)

        _trace._export = export
