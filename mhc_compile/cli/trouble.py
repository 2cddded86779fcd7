"""How a command fails: one paragraph on stderr and an exit code; with `--debug` the trace above it."""

from __future__ import annotations

import traceback
from typing import Any

import click

from mhc_compile.errors import MhcError, OptionError, UnknownAddError

__all__ = ["FactoryError", "TargetError", "WeightsError", "debug_option", "report"]

_FLAG = "mhc_compile.debug"


class TargetError(MhcError):
    """The command line names a model that cannot be had."""


class FactoryError(MhcError):
    """The target is there, and the code that makes the model failed."""


class WeightsError(MhcError):
    """A checkpoint cannot be loaded into the model of a target."""


def debug_option() -> click.Option:
    """`--debug`, for the group and for every command."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set, help="Show the trace of an error."
    )


def _set(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    settings = ctx.find_root().ensure_object(dict)
    settings[_FLAG] = value or settings.get(_FLAG, False)


def report(error: Exception, settings: dict[str, Any]) -> int:
    """Writes `error` on stderr and returns the exit code: 2 for a target, an option or an add that does not exist, 1 for any other trouble.

    Args:
        error: what was raised.
        settings: the object of the click group, in which `--debug` left its mark.
    """
    from mhc_compile.tools.zoo import UnknownFamilyError

    if settings.get(_FLAG):
        traceback.print_exception(error)
    expected = isinstance(error, MhcError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    hint = "" if expected or settings.get(_FLAG) else " (not an error that mhc foresaw; --debug shows the trace)"
    click.echo(f"mhc: {text}{hint}", err=True)
    return 2 if isinstance(error, OptionError | TargetError | UnknownAddError | UnknownFamilyError) else 1
