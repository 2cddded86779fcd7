"""`mhc zoo [NAME...]`: check families of models and print a table."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.option_flags import given_options, option_flags
from mhc_compile.cli.shared import Command, print_json, result_console, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.tools.zoo.check import Outcome
    from mhc_compile.tools.zoo.family import Family, Mode


@click.command("zoo", cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--group", help="Check all families of one theme.")
@click.option("--layers", type=click.IntRange(2), default=2, show_default=True, help="Depth of the models.")
@click.option("--mode", type=click.Choice(["train", "eval", "both"]), default="train", show_default=True)
@click.option("--structure", is_flag=True, help="Compare sites and chains only, without running the models.")
@click.option("--list", "only_list", is_flag=True, help="List the families with their chains, without checking them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else there.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@option_flags
def command(
    names: tuple[str, ...],
    group: str | None,
    layers: int,
    mode: str,
    structure: bool,
    only_list: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Check families of models: residual adds found, nothing else touched, numbers kept.

    The models are tiny and randomly initialized; nothing is downloaded. Without NAME and --group
    all families are checked, which takes many minutes. `mhc explain zoo:NAME` shows one of them in
    detail.

    Columns: sites found/expected; lengths of chains; skipped additions by reason; largest relative
    error of an output and of a gradient.

    Exit code 1 if an outcome deviates from the expected one or fails.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see `mhc demo`; read when torch is loaded
    from mhc_compile.tools import zoo
    from mhc_compile.tools.zoo.report import summary, table, to_json

    chosen = tuple(zoo.get(name) for name in names) if names else zoo.list_families(group)
    chosen = tuple(family for family in chosen if group in {None, family.group})
    settings = given_options(flags)  # a wrong option is an error before the first model is built
    if only_list:
        _list(chosen, layers, as_json)
        return
    modes: tuple[Mode, ...] = ("train", "eval") if mode == "both" else ("eval",) if mode == "eval" else ("train",)
    jobs = [(family, one) for family in chosen for one in modes]
    outcomes = _check_all(jobs, quiet=quiet, layers=layers, options=settings, preserve=not structure)
    if as_json:
        print_json(to_json(outcomes))
    else:
        console = result_console()
        console.print(table(outcomes, console.width))
        console.print(summary(outcomes), soft_wrap=True)
    if any(outcome.status in {"deviates", "failed"} for outcome in outcomes):
        raise click.exceptions.Exit(1)


def _list(chosen: Sequence[Family], layers: int, as_json: bool) -> None:
    from mhc_compile.tools.zoo.report import listing

    expected = [", ".join(map(str, family.expected(layers, "train").chains)) or "none" for family in chosen]
    rows = [(family.name, family.group, family.needs, one) for family, one in zip(chosen, expected, strict=True)]
    if as_json:
        keys = ("family", "group", "needs", "chains")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        write(listing(rows))


def _check_all(jobs: Sequence[tuple[Family, Mode]], *, quiet: bool, **settings: Any) -> list[Outcome]:
    """Return the outcomes in order, with a bar on a terminal; deviations are printed at once."""
    from rich.console import Console

    from mhc_compile._torch import show_compiler_errors_only
    from mhc_compile.reporting.progress import choose_progress
    from mhc_compile.tools.zoo.check import check

    warnings.filterwarnings("ignore", module=r"(torch|transformers)\.")
    show_compiler_errors_only()  # graph breaks are counted
    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    with choose_progress(console, quiet=quiet) as progress:
        if console.is_terminal:
            progress.count("", len(jobs))
        for family, mode in jobs:
            progress.advance(f"{family.name} {mode}", done=len(outcomes))
            outcome = check(family, mode=mode, **settings)
            outcomes.append(outcome)
            if outcome.status in {"deviates", "failed"}:
                progress.note(f"{family.name} {mode}: {outcome.message}")
    return outcomes
