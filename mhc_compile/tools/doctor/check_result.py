"""Run checks; their results as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import RenderableType


class Problem(Exception):  # noqa: N818 - the result of a check, not an error of the program
    """Raised by a check: what it found, what to do about it, and its status (see `CheckResult`)."""

    def __init__(self, found: str, advice: str, *, status: Literal["warning", "failed"] = "failed") -> None:
        super().__init__(found)
        self.found, self.advice, self.status = found, advice, status


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    name: str  # subject of the check
    #: "warning": it works, but not as well or not in full. "failed": compiling will fail.
    status: Literal["ok", "warning", "failed"]
    found: str  # in a few words
    advice: str = ""  # remedy, "" for "ok"


@dataclass(frozen=True)
class Report:
    """All results, in the order of the checks."""

    findings: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: {schema, ok, findings: [{name, status, found, advice}]}."""
        return {"schema": "mhc-compile/doctor/1", "ok": self.ok, **asdict(self)}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        looks = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column()
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            sign, style = looks[finding.status]
            text = Text(finding.found).append(f"\n{finding.advice}" if finding.advice else "", style=style)
            table.add_row(Text(sign, style=style), finding.name, text)
        warnings = sum(finding.status == "warning" for finding in self.findings)
        verdict = f"It works; {warnings} warning{'s'[: warnings > 1]}." if warnings else "Everything works."
        verdict = verdict if self.ok else "Compiling with mhc will fail here."
        return Group(table, Text(), Text(verdict, style="bold" if self.ok else "bold red"))


def run_checks(checks: Mapping[str, Callable[[], str | None]]) -> Report:
    """Run checks by name. Each returns its finding, or None for no result, or raises `Problem`."""
    results = []
    for name, check in checks.items():
        try:
            results.append(CheckResult(name, "ok", check() or ""))
        except Problem as problem:
            results.append(CheckResult(name, problem.status, problem.found, problem.advice))
        except Exception as error:  # a check that breaks has failed, and the others go on
            text = f"{type(error).__name__}: {error}"
            results.append(CheckResult(name, "failed", text, "The check itself broke; please report it."))
    return Report(tuple(result for result in results if result.found))
