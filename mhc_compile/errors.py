"""Every error and warning that this package raises, all of them importable from `mhc_compile`."""

from __future__ import annotations

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
