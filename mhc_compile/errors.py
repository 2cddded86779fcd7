"""The errors and warnings of this package."""

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
    "OutsideCallError",
    "PlanError",
    "RewriteError",
    "ShapeError",
    "StreamsLostError",
    "UnknownAddError",
    "warn",
]


class MhcError(Exception):
    """Base of all errors raised on purpose. The message restates the input and a way out."""


class OptionError(MhcError, ValueError):
    """An option is unknown, has the wrong type or lies outside its range."""


class ShapeError(MhcError, ValueError):
    """Tensors passed to an mHC operation or module do not fit together."""


class AttachError(MhcError, RuntimeError):
    """Hyper-connections could not be attached, or existing ones contradict the options."""


class CaptureError(MhcError, RuntimeError):
    """The model could not be traced with the example inputs."""


class CheckpointError(MhcError, ValueError):
    """A checkpoint is of another system, or has entries without a counterpart there."""


class OutsideCallError(MhcError, RuntimeError):
    """`outside_calls="error"`, and a model with hyper-connections ran outside `torch.compile`."""


class PlanError(MhcError, ValueError):
    """A file is no plan, or a plan contradicts the options."""


class UnknownAddError(MhcError, LookupError):
    """`why` was asked for an addition that is not in the model."""


class NothingRewrittenError(MhcError, RuntimeError):
    """`strict=True` and no residual add of the model was rewritten."""


class RewriteError(MhcError, RuntimeError):
    """`strict=True` and an exception, the cause, kept residual adds from being rewritten."""


class StreamsLostError(MhcError, RuntimeError):
    """`strict=True` and streams that left one compiled graph did not reach the next."""


class MhcWarning(UserWarning):
    """A problem a user should know: nothing rewritten, streams dropped, an optimizer incomplete."""


_HERE = os.path.dirname(os.path.abspath(__file__))


def warn(message: str, *, repeat: bool = False) -> None:
    """Issue an `MhcWarning` that points at the innermost frame outside this package and torch.

    Args:
        message: the text of the warning.
        repeat: show every call, unless the user's filters say otherwise. By default Python shows a
            message once for each line.
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
