"""What the repository promises about itself."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("python3 -m venv .venv && ")]


def test_ci_runs_exactly_the_readme_s_test_command():
    run, test = commands((ROOT / "README.md").read_text())[:2]
    assert run.endswith("mhc demo")
    assert test.endswith("pytest")
    assert commands((ROOT / ".ci" / "run").read_text()) == [f"{test} || failed=1"]


def test_the_top_level_is_fixed():
    allowed = {"mhc_compile", "passes", "tests", "examples", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - {"build", "runs", "mhc_compile.egg-info"} == allowed


def test_passes_know_nothing_of_the_front_door():
    for path in (ROOT / "passes").glob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import) (mhc_compile[\w.]*)(?: import (\w+))?", path.read_text(), re.MULTILINE
        )
        for module, name in imported:
            known = {("mhc_compile", "ops"), ("mhc_compile.errors", name)}  # the errors know nobody
            assert module.startswith("mhc_compile.passes") or (module, name) in known, (
                path.name,
                module,
            )


def test_private_names_of_torch_live_in_one_place():
    """Other modules may use public names only; two exceptions are classes that torch documents but keeps in private modules."""
    for path in (ROOT / "mhc_compile").rglob("*.py"):
        if path.name == "_torch.py" or {"_torch", "passes"} & set(path.parts):
            continue
        for module in re.findall(r"^\s*from (torch[\w.]*) import", path.read_text(), re.MULTILINE):
            private = any(part.startswith("_") for part in module.split("."))
            assert not private or module == "torch._subclasses.fake_tensor", (path.name, module)


def test_every_package_is_in_the_wheel_s_list():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mhc_compile").rglob("__init__.py")
        if "passes" not in path.parts
    }
    assert found | {"mhc_compile.passes"} == listed
