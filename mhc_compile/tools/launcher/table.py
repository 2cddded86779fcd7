"""Options of the backend from the table `[tool.mhc]` of a `pyproject.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_table"]


def find_table(*starts: Path) -> dict[str, Any]:
    """The options of the first `pyproject.toml` that has a table `[tool.mhc]`, from each directory of `starts` upwards; {} if none has.

    Names may be written with dashes. Tables below `[tool.mhc.inductor]` are dotted names: `triton.cudagraphs = true`.

    Raises:
        OptionError: a file on the way is no TOML, or the table has a wrong option; the message names the file.
    """
    for start in starts:
        directory = start.resolve()
        for folder in (directory, *directory.parents):
            file = folder / "pyproject.toml"
            if file.is_file():
                table = _read(file)
                if table is not None:
                    return table
    return {}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} may have a table [tool.mhc], but it is no TOML: {error}") from None
    tool = content.get("tool", {})
    table = tool.get("mhc") if isinstance(tool, Mapping) else None
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise OptionError(f"{file}: tool.mhc is {table!r}; expected a table such as [tool.mhc] with streams = 4")
    options = {name.replace("-", "_"): value for name, value in table.items()}
    if isinstance(options.get("inductor"), Mapping):
        options["inductor"] = dict(_dotted(options["inductor"]))
    try:
        Options.parse(options)
    except OptionError as error:
        raise OptionError(f"{file}, [tool.mhc]: {error}") from None
    return options


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in table.items():
        entries += _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return entries
