"""Warnings that point at the user's line, not at ours or torch's."""

from __future__ import annotations

import os
import sys
import warnings

from mhc_compile.errors import MhcWarning

__all__ = ["warn"]

_HERE = os.path.dirname(os.path.abspath(__file__))


def warn(message: str) -> None:
    """`MhcWarning` at the innermost frame that belongs neither to this package nor to torch."""
    torch = sys.modules.get("torch")
    inside = (_HERE, os.path.dirname(torch.__file__)) if torch is not None and torch.__file__ else (_HERE,)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MhcWarning, stacklevel=level)
