"""Errors of the command line: a message on stderr, an exit code, and `--debug` for a traceback."""

from __future__ import annotations

import difflib
import os
import traceback
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.errors import MhcError, OptionError, UnknownAddError

if TYPE_CHECKING:
    from collections.abc import Iterable

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


def near_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "; near names: one, other", or ""."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count) or [k for k in known if name and name in k][:count]
    return f"; near names: {', '.join(near)}" if near else ""


def near_files(path: str) -> str:
    """Return similar files in the directory of `path`, or say that it is missing."""
    directory, name = os.path.split(path)
    if directory and not os.path.isdir(directory):
        return f"; there is no directory {directory!r} either"
    suffix = os.path.splitext(name)[1]
    files = [entry for entry in sorted(os.listdir(directory or ".")) if entry.endswith(suffix)]
    return near_names(name, files) or (f"; there are {', '.join(files[:3])}" if files else "")


def require_file(path: str, flag: str = "") -> None:
    """Raise TargetError, which begins with `flag`, unless there is such a file."""
    if not os.path.isfile(path):
        raise TargetError(f"{flag}there is no file {path!r} (looked in {os.getcwd()}){near_files(path)}")


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
