"""Make the pictures of README and of this guide with the commands that they show.

The picture of the page needs chromium, its driver and selenium; without them it is skipped, and
a line says so.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 100
TERMINALS = {
    "diff": ("diff", "hf:llama", "--set", "num_hidden_layers=16"),
    "kernels": ("diff", "zoo:pre-norm", "--kernels"),
}
PAGE = ("diff", "hf:gpt2", "--set", "n_layer=12", "--html")
DRAWING = ("diff", "hf:gpt2", "--set", "n_layer=12", "--svg")

THEME = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [
        (36, 41, 47),
        (180, 35, 24),
        (17, 99, 41),
        (125, 78, 0),
        (9, 105, 218),
        (130, 80, 223),
        (10, 110, 125),
        (110, 119, 129),
    ],
    [
        (87, 96, 106),
        (164, 14, 38),
        (26, 127, 55),
        (99, 60, 1),
        (33, 139, 255),
        (164, 117, 249),
        (49, 146, 170),
        (140, 149, 159),
    ],
)
# rich's own frame loads a font from the network; this one uses installed fonts.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>{chrome}</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def mhc(*arguments: str) -> str:
    command = [sys.executable, "-m", "mhc_compile", *arguments, "--quiet"]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def terminal(folder: Path, name: str, arguments: tuple[str, ...]) -> None:
    line = "mhc " + " ".join(arguments)
    console = Console(
        record=True, file=io.StringIO(), width=COLUMNS, force_terminal=True, color_system="standard", highlight=False
    )
    console.print(Text.assemble(("$ ", "dim"), (line, "bold"), "\n"))
    console.print(Text.from_ansi(mhc(*arguments)))
    svg = console.export_svg(title="", theme=THEME, code_format=FRAME.replace("{chrome}", line), unique_id=name)
    (folder / f"{name}.svg").write_text(svg)


def photograph(target: Path, name: str, arguments: tuple[str, ...]) -> None:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        print(f"no chromium: {name}.png is skipped")
        return
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "diff.html")
        mhc(*arguments, str(page))
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1360,860")
        for flag in (*flags, f"user-data-dir={folder}/profile"):
            options.add_argument(f"--{flag}")
        window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        try:
            window.get(f"{page.as_uri()}#g0:after:mhc_streams_1")
            window.find_element(By.TAG_NAME, "body")
            window.save_screenshot(str(target / f"{name}.png"))
        finally:
            window.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where to write them")
    parser.add_argument("--no-page", action="store_true", help="skip the picture that needs a browser")
    arguments = parser.parse_args()
    for name, command in TERMINALS.items():
        terminal(arguments.folder, name, command)
    mhc(*DRAWING, str(arguments.folder / "trunk.svg"))
    if not arguments.no_page:
        photograph(arguments.folder, "page", PAGE)


if __name__ == "__main__":
    main()
