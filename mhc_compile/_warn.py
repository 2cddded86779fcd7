"""Warnings that point at the user's line, not at ours or torch's."""

from __future__ import annotations

import os
import sys
import warnings

from mhc_compile.errors import MhcWarning

__all__ = ["warn"]

_HERE = os.path.dirname(os.path.abspath(__file__))


def warn(message: str, *, repeat: bool = False) -> None:
    """`MhcWarning` at the innermost frame that belongs neither to this package nor to torch.

    Args:
        message: what the user should know.
        repeat: by default Python shows the same message at the same line once in a process. With `repeat` every call is shown, unless the user's
            filters say otherwise: for callers that count for themselves.
    """
    torch = sys.modules.get("torch")
    inside = (_HERE, os.path.dirname(torch.__file__)) if torch is not None and torch.__file__ else (_HERE,)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(inside):
        frame, level = frame.f_back, level + 1
    if repeat:
        warnings.warn_explicit(
            message, MhcWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), registry={}
        )
    else:
        warnings.warn(message, MhcWarning, stacklevel=level)
