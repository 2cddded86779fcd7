"""The options of the backend as flags of a command, made from `Options` itself: names, defaults, choices and help."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from mhc_compile.cli.targets import TargetError, parse_settings
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError

__all__ = ["given_options", "option_flags"]


def option_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a command with one flag for every option; those that are not given are None, or ()."""
    kinds, texts = get_type_hints(Options), _texts()
    for field in reversed(fields(Options)):
        flag, text, kind = f"--{field.name.replace('_', '-')}", texts.get(field.name, ""), kinds[field.name]
        if kind is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
        elif get_origin(kind) is Mapping:
            option = click.option(flag, field.name, multiple=True, metavar="NAME=VALUE", help=f"{text} Repeatable.")
        else:
            shown = f"{text}  [default: {field.default}]"
            option = click.option(flag, field.name, type=_value, metavar=_metavar(kind), help=shown)
        command = option(command)
    return command


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the parameters of a command that were given.

    Raises:
        click.UsageError: one is wrong.
    """
    given = {name: value for name, value in values.items() if value not in (None, ())}
    try:
        for name in {"inductor", "overrides"} & given.keys():
            given[name] = parse_settings(given[name])
        Options.parse(given)
    except (OptionError, TargetError) as error:
        raise click.UsageError(str(error)) from error
    return given


def _value(text: str) -> Any:
    """A Python literal, or else a string. What is right is for `Options` to say, in its own words."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _metavar(kind: Any) -> str:
    literals = [kind, *get_args(kind)]
    for part in literals:
        if get_origin(part) is Literal:
            return "|".join(get_args(part))
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "NAME")


def _texts() -> dict[str, str]:
    """What the docstring of `Options` says first about each attribute, up to a colon or a full stop."""
    known = "|".join(Options.names())
    _, *parts = re.split(rf"^ *({known}): ", inspect.getdoc(Options) or "", flags=re.MULTILINE)
    texts = (re.split(r":\s|\.\s| \(e\.g", f"{text} ")[0].strip() for text in parts[1::2])
    return {name: _sentence(" ".join(text.split())) for name, text in zip(parts[::2], texts, strict=True)}


def _sentence(text: str) -> str:
    symbol = len(text.split(",")[0]) == 1  # n is not written N
    return f"{text if symbol else text[:1].upper() + text[1:]}."
