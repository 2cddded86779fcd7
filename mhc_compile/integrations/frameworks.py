"""The callback classes of transformers and Lightning, for a callback that serves them both and imports neither."""

from __future__ import annotations

import functools
import sys
from typing import Any

__all__ = ["dressed"]

#: Where the classes are.
_HOMES = (
    ("transformers", "TrainerCallback"),  # loaded on first use: this asks for it
    ("lightning.pytorch.callbacks", "Callback"),
    ("pytorch_lightning.callbacks", "Callback"),
)


def dressed(kind: type) -> type:
    """`kind`, and below it the callback classes of those frameworks that are imported: their trainers ask for instances of them.

    What `kind` defines has precedence over all of them.
    """
    found = (getattr(sys.modules.get(module), name, None) for module, name in _HOMES)
    return _with(kind, tuple(base for base in found if isinstance(base, type)))


@functools.cache
def _with(kind: type, bases: tuple[type, ...]) -> type:
    if not bases:
        return kind
    names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, *bases), names)
