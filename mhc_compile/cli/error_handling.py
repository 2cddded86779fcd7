"""Errors of the command line: a message on stderr, an exit code, and `--debug` for a traceback."""

from __future__ import annotations

import traceback
from typing import Any

import click

from mhc_compile.errors import MhcError, OptionError, UnknownAddError

_FLAG = "mhc_compile.debug"


class TargetError(MhcError):
    """No model can be made of the TARGET that was given."""


class FactoryError(MhcError):
    """The code of the target exists and failed."""


class WeightsError(MhcError):
    """A checkpoint does not fit the model of the target."""


def one_line(error: BaseException, most: int | None = 200) -> str:
    """Return the class and the text of an error, of the text at most so many characters."""
    text = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}{f': {text}' if text else ''}"


def debug_option() -> click.Option:
    """Return `--debug`, an option of the group and of every command."""
    text = "Show the traceback of an error."
    return click.Option(["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set, help=text)


def _set(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    settings = ctx.find_root().ensure_object(dict)
    settings[_FLAG] = value or settings.get(_FLAG, False)


def report(error: Exception, settings: dict[str, Any]) -> int:
    """Write `error` to stderr; return 2 if a target, option or addition does not exist, else 1.

    `settings` is the object of the click group, in which `--debug` is recorded.
    """
    from mhc_compile.tools.zoo import UnknownFamilyError

    if settings.get(_FLAG):
        traceback.print_exception(error)
    expected = isinstance(error, MhcError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    hint = "" if expected or settings.get(_FLAG) else " (unexpected error; --debug shows the traceback)"
    click.echo(f"mhc: {text}{hint}", err=True)
    return 2 if isinstance(error, OptionError | TargetError | UnknownAddError | UnknownFamilyError) else 1
