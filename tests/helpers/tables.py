"""Tables of numbers in Markdown, which tests compare with or write (`--regenerate`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def compare_rows(table: Path, first: str, rows: list[str], *, regenerate: bool, same_versions: bool) -> None:
    """Compare with the lines of a table whose first cell is `first`, or write them.

    Where other versions than the table's are installed, numbers may differ.
    """
    lines = table.read_text().splitlines(keepends=True)
    own = [line for line in lines if line.startswith(f"| {first} |")]
    if regenerate:
        at = lines.index(own[0]) if own else len(lines)
        lines[at : at + len(own)] = rows
        table.write_text("".join(lines))
    elif same_versions:
        assert own == rows
