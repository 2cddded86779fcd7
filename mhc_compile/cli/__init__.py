"""The `mhc` command. Commands are imported when they run: `mhc --help` must not import torch."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from mhc_compile import __version__
from mhc_compile.cli.error_handling import debug_option, near_names, report

__all__ = ["main"]

#: The commands and their line in `mhc --help`. The module of a command has its name.
_COMMANDS = {
    "bench": "Measure what hyper-connections cost: ours, other implementations, plain, and the physical limit.",
    "check": "Prove on this machine that a rewritten model computes what the plain one does.",
    "convert": "Rewrite a checkpoint from the layout of DeepSeek-V4, GLM-5-next, HY-V4 or Qwen4-Exp into ours, or back.",
    "demo": "Train GPT-2 on the standard library's sources, plain and with hyper-connections.",
    "diff": "Show what changes in the graph of a model: text, page, drawing, kernels.",
    "doctor": "Check this machine: versions, compiler, caches, entry point, a tiny compile.",
    "explain": "Show which residual adds of a model are rewritten, and why the others are skipped.",
    "plan": "Write where the hyper-connections of a model or of a script's models belong, for mhc run --plan.",
    "run": 'Run an unmodified script: its torch.compile(model) becomes torch.compile(model, backend="mhc").',
    "scaling": "Estimate what hyper-connections cost at 3B to 671B, and at a size of your own.",
    "stability": "Measure what the residual mixing does over depth: gains, products of H_res, streams.",
    "zoo": "Check many families of models: every residual add found, nothing else touched, numbers kept.",
}


class _Lazy(click.Group):
    """A group that imports `command` from `mhc_compile.cli.<name>` when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"mhc_compile.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command in `args`; an unknown one is an error with near names."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            hint = near_names(args[0], _COMMANDS, 2) or f"; known commands: {', '.join(sorted(_COMMANDS))}"
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mhc")
def _group() -> None:
    """Manifold-Constrained Hyper-Connections for any PyTorch model.

    Exit codes: 0 fine, 1 a finding or an error, 2 wrong usage, 130 interrupted.
    """


_group.params.append(debug_option())


def main() -> None:
    """Run the console entry point."""
    settings: dict[str, Any] = {}
    try:
        code = _group(obj=settings, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("mhc: interrupted", err=True)
        code = 130
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = report(error, settings)
    sys.exit(code if isinstance(code, int) else 0)
