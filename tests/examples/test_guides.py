"""Check that what the guides name exists, and that commands print what is quoted."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from helpers.guides import EXAMPLES, ROOT, blocks, environment, guides, quotes, replace_output, words

import mhc_compile
from mhc_compile.config.options import Options
from mhc_compile.passes import Reason

GUIDES = pytest.mark.parametrize("guide", guides(), ids=lambda path: path.relative_to(ROOT).as_posix())
#: Commands that train or measure: compared in other tests, or figures with conditions.
LONG = {"run", "demo", "bench", "doctor"}
TOP = ("mhc_compile", "passes", "tests", "examples", ".ci", ".github")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


@GUIDES
def test_prose_is_wrapped(guide):
    in_block = False
    for line in guide.read_text().splitlines():
        in_block ^= line.startswith("```")
        assert in_block or line.startswith("|") or len(line) <= 100, line


def test_every_folder_of_examples_has_a_guide_that_readme_names():
    readme = (ROOT / "README.md").read_text()
    for folder in EXAMPLES.iterdir():
        assert (folder / "README.md").exists(), folder
        assert f"(examples/{folder.name}/" in readme, folder


@GUIDES
def test_links_and_paths_exist(guide):
    text = guide.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (guide.parent / target).exists(), f"{guide}: {target}"
    for path in re.findall(r"`([\w.]+/[\w./-]*)`", text):
        if path.split("/")[0] in TOP:
            assert (ROOT / path).exists(), f"{guide}: {path}"
    for command in re.findall(r"(?:python|torchrun|mhc run).*?(examples/[\w/]+\.py)", text):
        assert (ROOT / command).exists(), f"{guide}: {command}"


@GUIDES
def test_python_blocks_name_what_exists(guide):
    for block in blocks(guide, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mhc_compile":
                assert getattr(mhc_compile, node.attr, None) or importlib.import_module(f"mhc_compile.{node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhc_compile"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
            if isinstance(node, ast.keyword) and node.arg == "options" and isinstance(node.value, ast.Dict):
                assert {key.value for key in node.value.keys} <= set(Options.names()), block


def spoken(guide) -> list[list[str]]:
    """Every `mhc ...` command of a guide: in code blocks, and between backticks."""
    lines = [command for command, _ in quotes(guide) if command.startswith("mhc ")]
    lines += re.findall(r"^(mhc [a-z].*)", "\n".join(blocks(guide, "sh")), re.MULTILINE)
    lines += re.findall(r"`(mhc [a-z][^`]*)`", guide.read_text())
    return [shlex.split(line.replace("[", "").replace("]", ""), comments=True)[1:] for line in lines]


@GUIDES
def test_commands_and_flags_exist(guide):
    for name, *arguments in spoken(guide):
        command = importlib.import_module(f"mhc_compile.cli.{name}").command
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for argument in arguments:
            if argument == "|" or (name in {"run", "plan"} and (argument.endswith(".py") or argument == "-m")):
                break
            if argument.startswith("--"):
                assert argument in known | {"--help"}, f"{guide}: mhc {name} {argument}"


def test_table_of_options():
    rows = re.findall(
        r"^\| `(\w+)` \| `(.*?)` \|", (EXAMPLES / "configuration" / "README.md").read_text(), re.MULTILINE
    )
    told = {name: ast.literal_eval(value) for name, value in rows if name in Options.names()}
    defaults = Options.parse(None)
    assert told == {name: getattr(defaults, name) for name in Options.names()}


def test_every_room_is_on_the_map():
    text = (ROOT / "mhc_compile" / "README.md").read_text()
    rooms = [path for path in (ROOT / "mhc_compile").iterdir() if (path / "__init__.py").exists()]
    assert rooms
    for room in rooms:
        assert f"| `{room.name}/` |" in text, room


def test_quick_start():
    """The code of README runs as it is printed, but for sizes and the inner compiler."""
    code = blocks(ROOT / "README.md", "python")[1]
    smaller = {'backend="mhc"': 'backend="mhc", options={"inner_backend": "eager"}', "n_embd=256": "n_embd=32"}
    for old, new in (smaller | {"range(10)": "range(2)", "50257, (2, 128)": "50257, (2, 8)"}).items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    connections = mhc_compile.connections(names["model"])
    assert len(connections) == 8
    trained = {id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]}
    assert all(id(connection.phi) in trained and connection.phi.any() for connection in connections.values())


def test_table_of_reasons():
    codes = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "passes" / "README.md").read_text(), re.MULTILINE)
    assert codes == [reason.value for reason in Reason]


def _quoted_commands():
    for guide in guides():
        for command, output in quotes(guide):
            if command.startswith("mhc ") and command.split()[1] not in LONG:
                yield pytest.param(guide, command, output, id=command)


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "command", "output"), list(_quoted_commands()))
def test_commands_print_what_is_quoted(guide, command, output, regenerate):
    shell = f'mhc() {{ "{sys.executable}" -m mhc_compile "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=False, env=environment(), cwd=ROOT, timeout=900
    )
    # Rich pads the columns of tables; Markdown has no use for spaces at the end of a line.
    printed = "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())
    assert printed, done.stderr
    if regenerate and words(printed) != words(output):
        replace_output(guide, output, printed)
    else:
        assert words(printed) == words(output), "if the new words are meant: pytest --regenerate"
