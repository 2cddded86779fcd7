"""`mhc doctor`."""

from __future__ import annotations

import click

from mhc_compile.cli.shared import Command, print_json, progress, write


@click.command("doctor", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(as_json: bool, quiet: bool) -> None:
    """Check that this machine has what backend="mhc" needs, and that it works.

    Looks at versions, the parts of torch that are used, the entry point, optional packages, the
    environment, the C++ compiler, GPU and Triton, caches, and compiles a tiny model in its own
    process. Says what to do about each failure.

    Exit codes: 0 it works, 1 something failed.
    """
    from mhc_compile.tools.doctor.check_result import run_checks
    from mhc_compile.tools.doctor.environment import CHECKS

    with progress("examining this machine", quiet=quiet):
        report = run_checks(CHECKS)
    if as_json:
        print_json(report.to_dict())
    else:
        write(report)
    if not report.ok:
        raise click.exceptions.Exit(1)
