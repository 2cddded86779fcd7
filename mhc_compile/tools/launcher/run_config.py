"""The configuration of a run: read from pyproject.toml, carried by an environment variable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError

#: The environment variable. Its value is four lines: `pid`, `prefix`, the message for a script that
#: never imports torch, and the `RunConfig` as JSON. `site/sitecustomize.py` reads the first three
#: without the standard library, which files next to the script may hide.
VARIABLE = "MHC_RUN"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run."""

    script: str  # the script as messages name it: "train.py", "-m package.module"
    options: dict[str, Any]  # options of the backend that differ from the defaults, validated
    quiet: bool  # report nothing
    plan: str | None = None  # the plan that models are constructed with
    plan_output: str | None = None  # where `mhc plan` writes a plan
    compile: bool = False  # compile models of a script that compiles none
    replace_inductor: bool = False  # take the place of a named backend "inductor"
    pid: int  # the process that becomes the script; all others are its children
    prefix: str  # `sys.prefix` of its Python. Pythons of other environments are not changed.
    reports: str  # a file that children append to. It exists once one of them has compiled something.

    @property
    def never_compiled(self) -> str:
        """The message for a script that compiles nothing."""
        if self.plan_output is not None:
            return f"mhc plan: no plan was written: {self.script} ran no model that torch.compile made. Add --compile"
        return (
            f"mhc run: nothing was rewritten: {self.script} ran no model that torch.compile made."
            " Write model = torch.compile(model), without a backend, in front of the training loop, or add --compile"
        )

    def dump(self) -> str:
        """Return the value of the variable.

        Raises:
            OptionError: a setting for Inductor is no number, string, truth value or list of those.
        """
        try:
            lines = [str(self.pid), self.prefix, "" if self.quiet else self.never_compiled, json.dumps(asdict(self))]
        except TypeError as error:
            raise OptionError(
                f"option 'inductor' is {self.options.get('inductor')!r}; mhc run can pass on numbers, strings, truth"
                f" values and lists: {error}"
            ) from None
        return "\n".join(line.replace("\n", " ") for line in lines)

    @classmethod
    def load(cls, value: str) -> RunConfig:
        """Return the configuration in the value of the variable."""
        return cls(**json.loads(value.rpartition("\n")[2]))


def read_plan(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with the options of the plan in `file`. Imports no torch.

    Raises:
        OptionError: the file is no plan, or the options contradict it.
    """
    try:
        models = json.loads(file.read_text(encoding="utf-8"))["models"]
        planned = dict(models[0]["options"])
    except (UnicodeDecodeError, ValueError, LookupError, TypeError):
        raise OptionError(
            f"{str(file)!r} is no plan. `mhc plan -o FILE train.py` makes one. A checkpoint needs no --plan:"
            " hyper-connections come with the load_state_dict of the script"
        ) from None
    for name, wants in planned.items():
        if given.get(name, wants) != wants:
            raise OptionError(
                f"{str(file)!r} was made with {name}={wants!r}, and {name}={given[name]!r} is given. Make the plan again"
                " with these options, or leave them out"
            )
    return {**planned, **given}


def find_options(*starts: Path) -> dict[str, Any]:
    """Return the options in the first `pyproject.toml` with a table `[tool.mhc]`, or {}.

    The directories of `starts` are searched upwards, in this order. Names may be written with
    dashes. "plan" is the path of a plan, in the file relative to its folder. Tables below
    `[tool.mhc.inductor]` are dotted names: `triton.cudagraphs = true`.

    Raises:
        OptionError: a file on the way is no TOML, or the table has a wrong option; the message
            names the file.
    """
    folders = (folder for start in map(Path.resolve, starts) for folder in (start, *start.parents))
    tables = (_read(file) for folder in folders if (file := folder / "pyproject.toml").is_file())
    return next((table for table in tables if table is not None), {})


def _read(file: Path) -> dict[str, Any] | None:
    import tomllib

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
    plan = options.pop("plan", None)
    if isinstance(options.get("inductor"), Mapping):
        options["inductor"] = dict(_dotted(options["inductor"]))
    try:
        Options.parse(options)
    except OptionError as error:
        raise OptionError(f"{file}, [tool.mhc]: {error}") from None
    if plan is not None:
        options["plan"] = str(file.parent / str(plan))
    return options


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in table.items():
        entries += _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return entries
