"""The Markdown files of the repository: their code blocks, and the output that they quote."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: A number as programs print it.
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|(?<=[a-z.])\d+(?=[.\s\]])")


def guides() -> list[Path]:
    """Every Markdown file that people read, without the changelog and generated reports."""
    found = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
    for folder in ("examples", "passes", "mhc_compile", "tests"):
        found += sorted(p for p in (ROOT / folder).rglob("README.md") if "mhc_compile/passes" not in p.as_posix())
    return found


def blocks(guide: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)


def quotes(guide: Path) -> list[tuple[str, str]]:
    """Return the commands of all console blocks, each with the output quoted below it."""
    return [
        (command, output)
        for block in blocks(guide, "console")
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


def quoted_output(guide: Path, command: str) -> str:
    """Return the output that a guide quotes below `$ command`."""
    found = [output for quoted, output in quotes(guide) if quoted.partition("  #")[0] == command]
    assert len(found) == 1, f"{guide.relative_to(ROOT)} quotes {command!r} {len(found)} times"
    return found[0]


def words(text: str) -> str:
    """Return the text without numbers and with single spaces, as figures differ from run to run."""
    return " ".join(NUMBER.sub("#", text).split())


def same_words(folder: str, command: str, output: str, regenerate: bool) -> None:
    """Compare output, perhaps of a smaller run, with a guide's quote, except for numbers."""
    guide = EXAMPLES / folder / "README.md"
    shown = quoted_output(guide, command)
    if regenerate and words(output) != words(shown):
        old = NUMBER.findall(shown)
        if len(old) == len(NUMBER.findall(output)):  # keep the numbers of the larger run that the guide shows
            numbers = iter(old)
            output = NUMBER.sub(lambda _: next(numbers), output)
        replace_output(guide, shown, output)
    else:
        assert words(output) == words(shown), "if the new words are meant: pytest --regenerate"


def replace_output(guide: Path, shown: str, output: str) -> None:
    """Write new output into a guide."""
    guide.write_text(guide.read_text().replace(shown, output))


def environment() -> dict[str, str]:
    """Return the environment of a child process: this checkout, one thread, 100 columns."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
