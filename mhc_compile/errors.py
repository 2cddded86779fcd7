"""The errors and warnings that this package raises, and how it warns."""

from __future__ import annotations

import os
import sys
import warnings

__all__ = [
    "AttachError",
    "CaptureError",
    "CheckpointError",
    "MhcError",
    "MhcWarning",
    "NothingRewrittenError",
    "OptionError",
    "ShapeError",
    "StreamsLostError",
    "UnknownAddError",
    "warn",
]


class MhcError(Exception):
    """Base of every error that mhc_compile raises on purpose. The message restates the input and names the way out."""


class OptionError(MhcError, ValueError):
    """An option is unknown, has the wrong type or lies outside its range."""


class ShapeError(MhcError, ValueError):
    """Tensors handed to an mHC operation or module do not fit together."""


class AttachError(MhcError, RuntimeError):
    """Hyper-connections could not be attached, or those already attached contradict the options."""


class CaptureError(MhcError, RuntimeError):
    """The model could not be traced with the example inputs."""


class CheckpointError(MhcError, ValueError):
    """A checkpoint is not of the system that it was said to be of, or has entries without a counterpart in the other layout."""


class UnknownAddError(MhcError, LookupError):
    """`why` was asked for an addition that the model does not have."""


class NothingRewrittenError(MhcError, RuntimeError):
    """`strict=True` and no residual add of the model was rewritten."""


class StreamsLostError(MhcError, RuntimeError):
    """`strict=True` and streams that left one compiled graph did not arrive at the next."""


class MhcWarning(UserWarning):
    """Something that a user should know: nothing was rewritten, streams were dropped, an optimizer was left alone."""


_HERE = os.path.dirname(os.path.abspath(__file__))


def warn(message: str, *, repeat: bool = False) -> None:
    """Issue an `MhcWarning` that points at the innermost frame outside this package and torch.

    Args:
        message: what the user should know.
        repeat: by default Python shows the same message at the same line once in a process. With
            `repeat` every call is shown, unless the user's filters say otherwise.
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
