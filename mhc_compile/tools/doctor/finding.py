"""What the doctor found, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Finding", "Report", "Status"]

#: "warning": it works, but not as well, or not everything does. "failed": compiling with mhc will fail.
Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: see `Status`.
        found: in a few words.
        advice: what to do about it, "" where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they were made."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: {schema, ok, findings: [{name, status, found, advice}]}."""
        findings = [asdict(finding) for finding in self.findings]
        return {"schema": "mhc-compile/doctor/1", "ok": self.ok, "findings": findings}

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)

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
            text = Text(finding.found)
            if finding.advice:
                text.append(f"\n{finding.advice}", style=style)
            table.add_row(Text(sign, style=style), finding.name, text)
        counts = Counter(finding.status for finding in self.findings)
        verdict = "Everything works." if self.ok else "Compiling with mhc will fail here."
        if self.ok and counts["warning"]:
            verdict = f"It works; {counts['warning']} warning{'s'[: counts['warning'] > 1]}."
        return Group(table, Text(), Text(verdict, style="bold" if self.ok else "bold red"))
