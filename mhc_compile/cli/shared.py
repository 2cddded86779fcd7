"""What the commands that look at a model have in common: how they name it, the backend's options as flags, and how they write.

stdout is the result, stderr is progress and trouble. A command that takes `--json` writes JSON to stdout and nothing else there.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mhc_compile.cli.option_flags import given_options, option_flags
from mhc_compile.cli.trouble import debug_option
from mhc_compile.config.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console, RenderableType

    from mhc_compile.cli.targets import Target

__all__ = [
    "Command",
    "backend_options",
    "open_target",
    "optional_target",
    "print_json",
    "progress",
    "result_console",
    "target_arguments",
    "weights_given",
    "write",
]

_WEIGHTS = "mhc_compile.weights"
_TARGET_HELP = (
    "TARGET: package.module:factory or path/to/file.py:factory (returns (model, args) or (model, args, kwargs)),"
    " hf:MODEL_TYPE (tiny, random; most transformers architectures), file.pt2 (an exported program), or zoo:FAMILY."
    " Targets are trusted input: their code is run."
)


class Command(click.Command):
    """A command whose help lists the backend's options in a section of their own, and says what a target is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first."""
        own: list[tuple[str, str]] = []
        backend: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                (backend if parameter.name in Options.names() else own).append(record)
        for title, records in (("Options", own), ("Options of the backend", backend)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What a target is, where the command takes one."""
        if any(parameter.name == "target" for parameter in self.params):
            formatter.write_paragraph()
            formatter.write_text(_TARGET_HELP)
        super().format_epilog(ctx, formatter)


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 - click's signature
    """Files, and the beginnings of the other kinds. Names behind them are not completed: shells take the colon for the end of a word."""
    kinds = [CompletionItem(kind) for kind in ("hf:", "zoo:") if kind.startswith(incomplete)]
    return [*kinds, CompletionItem(incomplete, type="file")]


def target_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a command with TARGET, what builds it (`--set`, `--full-size`, `--weights`, `--train/--eval`), and the options of the backend.

    The command gets `target: str`, `settings: tuple[str, ...]`, `full_size: bool`, `train: bool`, and one keyword for each option of the
    backend, None or () where it was not given: hand all but those four to `backend_options`. `--weights` is for `open_target` alone.
    """
    return _target_arguments(command, required=True)


def optional_target(command: Callable[..., Any]) -> Callable[..., Any]:
    """Like `target_arguments`; `target` is None where none was given."""
    return _target_arguments(command, required=False)


def _target_arguments(command: Callable[..., Any], *, required: bool) -> Callable[..., Any]:
    command = option_flags(command)
    for option in (
        click.option("--train/--eval", "train", default=True, help="Mode of the model.  [default: train]"),
        click.option(
            "--weights",
            type=click.Path(),
            metavar="FILE",
            expose_value=False,
            callback=_remember_weights,
            help="A checkpoint for the model: .safetensors, or what torch.save wrote of a state dict.",
        ),
        click.option(
            "--full-size", is_flag=True, help="hf: targets: the default config, on the meta device, without weights."
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="A field of the config of an hf: target, or layers of a zoo: target; repeatable.",
        ),
        click.argument("target", required=required, shell_complete=_complete),
    ):
        command = option(command)
    return command


def _remember_weights(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_WEIGHTS] = value


def weights_given() -> str | None:
    """The file that `--weights` names, in a command that has `target_arguments`."""
    context = click.get_current_context(silent=True)
    return context.meta.get(_WEIGHTS) if context is not None else None


def open_target(target: str, settings: tuple[str, ...], *, full_size: bool, train: bool) -> Target:
    """The target, loaded, its model with what `--weights` names and in the mode asked for.

    Raises:
        TargetError: no such target, or no such file of weights.
        FactoryError: the code of the target failed.
        WeightsError: the weights are not those of the model.
    """
    from mhc_compile.cli.targets import load_target, parse_settings

    weights = weights_given()
    loaded = load_target(target, parse_settings(settings), full_size=full_size, memory=weights is not None)
    if weights is not None:
        from mhc_compile.cli.targets.weights import load_weights

        load_weights(loaded, weights)
    loaded.set_mode(train)
    return loaded


#: The options of the backend among the keywords of a command. Raises click.UsageError.
backend_options = given_options


def result_console() -> Console:
    """Where results are printed: stdout, as wide as the terminal or COLUMNS says, 80 in a pipe, in colour unless NO_COLOR is set."""
    from rich.console import Console

    return Console(highlight=False)


def write(result: RenderableType) -> None:
    """Prints a result; in a pipe, without the blanks with which tables fill their lines."""
    console = result_console()
    if console.is_terminal:
        console.print(result)
        return
    with console.capture() as capture:
        console.print(result)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_json(data: Mapping[str, Any]) -> None:
    """Prints `data`, and nothing else, on stdout."""
    click.echo(json.dumps(data, indent=2))


def progress(text: str, *, quiet: bool) -> Any:
    """A context in which a spinner with `text` turns on stderr; nothing in a pipe, or with `quiet`."""
    from contextlib import nullcontext

    from rich.console import Console

    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status(text)
