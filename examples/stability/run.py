"""Train, measure and report. The same command continues after an interruption."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from experiment.plan import AGAIN, TABLES, ExperimentError, Plan, Run, read_json, write_json
from experiment.processes import measure_cost, start, train_again, train_all, train_variant
from experiment.report import report
from rich.console import Console

from mhc_compile.reporting.progress import choose_progress

OUT = Path(__file__).parent / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--table", choices=TABLES, default="main", help="which runs (default: main); what follows changes them"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: next to this file)")
    parser.add_argument("--processes", type=int, default=2, help="parallel runs, one thread each (default: 2)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing, write the report on the runs or, without any, summary.json",
    )
    parser.add_argument(
        "--again", metavar="RUN", help="train a finished run, e.g. mHC-0.002-0, again and compare bit for bit"
    )
    for field in fields(Plan):
        many = field.name in ("variants", "rates")
        kind = {"tuple[str, ...]": str, "tuple[float, ...]": float, "str": str, "float": float, "int": int}[
            str(field.type)
        ]
        default = " ".join(map(str, field.default)) if many else field.default
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, nargs="+" if many else None, type=kind, help=f"default: {default}")
    for name in ("--plan", "--worker"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--cost", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def planned(given: argparse.Namespace) -> Plan:
    plan = Plan.from_json(given.plan) if given.plan else TABLES[given.table]
    named = {field.name: getattr(given, field.name) for field in fields(Plan) if getattr(given, field.name) is not None}
    return replace(plan, **{name: tuple(value) if isinstance(value, list) else value for name, value in named.items()})


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    console = Console(stderr=True)
    given.out = given.out or (OUT if given.table == "main" else OUT / given.table)
    try:
        plan = planned(given)
        if given.worker:
            train_variant(plan, given.worker, given.out)
        elif given.cost:
            measure_cost(plan, given.out)
        elif given.again:
            return repeat(plan, given.again, given.out, console)
        else:
            everything(plan, given, console)
    except ExperimentError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept; the same command goes on.")
        return 130
    return 0


def everything(plan: Plan, given: argparse.Namespace, console: Console) -> None:
    if not given.report:
        with choose_progress(console, quiet=False) as progress:
            train_all(plan, given.out, given.processes, progress)
            if given.table == "main" and plan.cost(given.out) is None:
                progress.phase("measuring the cost of a step, all variants in turn")
                if start(plan, given.out, "--cost").wait():
                    raise ExperimentError("the measurement of cost failed; its message is above")
    for path in report(plan, given.out, pictures=given.table == "main"):
        print(path)


def repeat(plan: Plan, name: str, folder: Path, console: Console) -> int:
    variant, rate, seed = name.rsplit("-", 2)
    same = train_again(plan, Run(variant, float(rate), int(seed)), folder)
    known = read_json(folder / AGAIN) if (folder / AGAIN).exists() else {}
    write_json(folder / AGAIN, {**known, name: same})
    console.print(f"{name}: {'the same' if same else 'NOT the same'}, bit for bit, in a process of its own")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
