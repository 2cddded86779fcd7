"""Arguments, output and the target of the commands that look at one model: `model_command`.

stdout carries the result, stderr progress and errors. With `--json`, stdout is one JSON document.
"""

from __future__ import annotations

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mhc_compile.cli.error_handling import debug_option
from mhc_compile.cli.option_flags import given_options, option_flags
from mhc_compile.config.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    from mhc_compile.cli.targets import Target

_TARGET_HELP = (
    "TARGET: package.module:factory or path/to/file.py:factory (returns (model, args) or (model, args, kwargs)),"
    " hf:MODEL_TYPE (tiny, random; most transformers architectures), file.pt2 (an exported program), or zoo:FAMILY."
    " Targets are trusted input: their code is run."
)
_WEIGHTS_HELP = "Checkpoint to load into the model: .safetensors, or a state dict written by torch.save."
_FULL_SIZE_HELP = "hf: targets: use the default config, on the meta device, without weights."
_SET_HELP = "Set a config field of an hf: target, or layers of a zoo: target; repeatable."


class Command(click.Command):
    """A command with `--debug`, whose help lists backend options separately and explains TARGET."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the command, then those of the backend."""
        for title, of_backend in (("Options", False), ("Options of the backend", True)):
            parameters = [one for one in self.get_params(ctx) if (one.name in Options.names()) is of_backend]
            if records := [record for one in parameters if (record := one.get_help_record(ctx)) is not None]:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the kinds of targets, if the command takes one."""
        if any(parameter.name == "target" for parameter in self.params):
            formatter.write_paragraph()
            formatter.write_text(_TARGET_HELP)
        super().format_epilog(ctx, formatter)


@dataclass(frozen=True)
class ModelCall:
    """One call of a command made by `model_command`."""

    target: str  # TARGET as it was written; "" where it is optional and missing
    settings: tuple[str, ...]  # the values of `--set`
    full_size: bool  # whether `--full-size` was given
    weights: str | None  # the file given with `--weights`, or None
    train: bool  # whether the model is in training mode
    options: dict[str, Any]  # the options of the backend that were given, validated
    seed: int | None  # of all random numbers, None for a command that does not run the model
    as_json: bool  # whether the result is printed as JSON
    quiet: bool  # whether progress is hidden

    @functools.cached_property
    def loaded(self) -> Target:
        """The model and its inputs, loaded on first use: wrong usage is found before that."""
        from mhc_compile.cli.targets import load_target, parse_settings

        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)  # a factory may draw its weights and inputs
        settings, memory = parse_settings(self.settings), self.weights is not None
        loaded = load_target(self.target, settings, full_size=self.full_size, memory=memory)
        if self.weights is not None:
            from mhc_compile.cli.targets.weights import load_weights

            load_weights(loaded, self.weights)
        loaded.set_mode(self.train)
        return loaded

    def progress(self, doing: str) -> AbstractContextManager[Any]:
        """Return a context with a spinner on stderr that says "`doing` TARGET"."""
        return progress(f"{doing} {self.target}", quiet=self.quiet)

    def show(self, result: Any, **settings: Any) -> None:
        """Print `result.to_dict()` as JSON, or `result` by its renderer with these keywords."""
        from mhc_compile.reporting.base import render

        if self.as_json:
            print_json(result.to_dict())
        else:
            write(render(result, **settings))


def model_command(
    name: str, *, runs_model: bool = False, optional: bool = False, json_flag: bool = True
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of `function(call: ModelCall, **own_options)`.

    The command takes TARGET, `--set`, `--full-size`, `--weights`, `--train/--eval`, `--json`,
    `--quiet`, `--debug` and the options of the backend. `function` gets them as a `ModelCall`, and
    the options that its own click decorators declare as keywords. `mhc_compile.cli.main` turns its
    exceptions into messages and exit codes. `runs_model` adds `--seed`, and refuses a model without
    memory (`--full-size` alone); with `optional` TARGET may be missing; without `json_flag` there
    is no `--json`, for a command that has another one.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def call(target: str | None, as_json: bool = False, seed: int | None = None, **values: Any) -> None:
            if runs_model and values["full_size"] and values["weights"] is None:
                raise click.UsageError(
                    f"--full-size models have no memory without --weights FILE, and {name} runs the model:"
                    " leave it out, or --set sizes"
                )
            options = given_options({option: values.pop(option) for option in Options.names()})
            shared = {key: values.pop(key) for key in ("settings", "full_size", "weights", "train", "quiet")}
            function(ModelCall(target or "", options=options, seed=seed, as_json=as_json, **shared), **values)

        wrapped: Callable[..., Any] = option_flags(call)
        for option in (
            click.option("--train/--eval", "train", default=True, help="Mode of the model.  [default: train]"),
            click.option("--weights", type=click.Path(), metavar="FILE", help=_WEIGHTS_HELP),
            click.option("--full-size", is_flag=True, help=_FULL_SIZE_HELP),
            click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help=_SET_HELP),
            click.argument("target", required=not optional, shell_complete=_complete),
        ):
            wrapped = option(wrapped)
        command: click.Command = click.command(name, cls=Command)(wrapped)
        last = [click.Option(["--quiet"], is_flag=True, help="Show no progress.")]
        if json_flag:
            last.insert(0, click.Option(["--json", "as_json"], is_flag=True, help="Print JSON instead of text."))
        if runs_model:
            text = "Seed of all random numbers."
            seed = click.Option(["--seed"], type=click.IntRange(0), default=0, show_default=True, help=text)
            last.insert(0, seed)
        command.params[-1:-1] = last  # --debug stays the last one
        return command

    return decorate


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's signature
    """Complete files and prefixes."""
    # Shells split words at a colon: the names after a prefix cannot be completed.
    kinds = [CompletionItem(kind) for kind in ("hf:", "zoo:") if kind.startswith(incomplete)]
    return [*kinds, CompletionItem(incomplete, type="file")]


def result_console() -> Console:
    """Return a console on stdout. Its width is COLUMNS or the terminal's, 80 in a pipe."""
    from rich.console import Console

    return Console(highlight=False)


def write(result: RenderableType) -> None:
    """Print a result; in a pipe, without the spaces that fill the lines of tables."""
    console = result_console()
    if console.is_terminal:
        console.print(result)
        return
    with console.capture() as capture:
        console.print(result)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_json(data: Any) -> None:
    """Print `data` as JSON."""
    click.echo(json.dumps(data, indent=2))


def progress(text: str, *, quiet: bool) -> AbstractContextManager[Any]:
    """Return a context with a spinner and `text` on stderr; empty in a pipe or with `quiet`."""
    from rich.console import Console

    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status(text)
