"""Command line flags for the fields of `Options`: names, types, defaults and help texts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from mhc_compile.cli.error_handling import TargetError
from mhc_compile.cli.targets import parse_settings, parse_value
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError


def option_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one flag per option to a command; flags that are not given are None or ()."""
    hints, texts, paper = get_type_hints(Options), _texts(), Options().resolved
    for field in reversed(fields(Options)):
        flag, text, kinds = f"--{field.name.replace('_', '-')}", texts.get(field.name, ""), _kinds(hints[field.name])
        by_preset = field.default is None  # the preset decides
        default = f"{getattr(paper, field.name)}, or the preset's" if by_preset else f"{field.default}"
        if kinds == (bool,):
            option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
        elif get_origin(kinds[0]) is Mapping:
            option = click.option(flag, field.name, multiple=True, metavar="NAME=VALUE", help=f"{text} Repeatable.")
        else:
            shown = f"{text}  [default: {default}]"
            option = click.option(flag, field.name, type=parse_value, metavar=_metavar(kinds), help=shown)
        command = option(command)
    return command


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options among the parameters of a command that were given.

    Raises:
        click.UsageError: one of them is wrong.
    """
    given = {name: value for name, value in values.items() if value not in (None, ())}
    try:
        for name in {"inductor", "overrides"} & given.keys():
            given[name] = parse_settings(given[name])
        Options.parse(given)
    except (OptionError, TargetError) as error:
        raise click.UsageError(str(error)) from error
    return given


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union without None, or the type itself."""
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    return tuple(part for part in parts if part is not NoneType)


def _metavar(kinds: tuple[Any, ...]) -> str:
    for part in (*kinds, *get_args(kinds[0])):
        if get_origin(part) is Literal:
            return "|".join(get_args(part))
    return {int: "INTEGER", float: "NUMBER"}.get(kinds[0], "NAME")


def _texts() -> dict[str, str]:
    """Return the docstring of each option, up to the first colon or full stop."""
    known = "|".join(Options.names())
    _, *parts = re.split(rf"^ *({known}): ", inspect.getdoc(Options) or "", flags=re.MULTILINE)
    texts = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        text = " ".join(re.split(r":\s|\.\s| \(e\.g", f"{part} ")[0].split())
        symbol = len(text.split(",")[0]) == 1  # n is not written N
        texts[name] = f"{text if symbol else text[:1].upper() + text[1:]}."
    return texts
