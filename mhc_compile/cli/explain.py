"""`mhc explain TARGET`: the dry run, for people and as JSON."""

from __future__ import annotations

import json

import click

__all__ = ["command"]


@click.command("explain")
@click.argument("target")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A field of the config of an hf: target, or layers of a zoo: target.",
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the backend (streams=2); repeatable."
)
@click.option("--eval", "evaluate", is_flag=True, help="Trace the model in eval mode instead of training mode.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the report.")
@click.option("--all", "every", is_flag=True, help="List every addition that is left alone, not one per reason.")
def command(
    target: str, settings: tuple[str, ...], options: tuple[str, ...], evaluate: bool, as_json: bool, every: bool
) -> None:
    """Show what backend="mhc" would rewrite in TARGET, what it would leave alone and why, and what it costs.

    TARGET is package.module:factory, path/to/file.py:factory, hf:MODEL_TYPE or zoo:FAMILY. A factory returns (model, args) or
    (model, args, kwargs), with example inputs. hf: builds the architecture from its default config on the meta device, without weights: hf:gpt2,
    hf:llama, hf:vit. zoo: builds one of the tiny models that `mhc zoo --list` lists.

    Nothing of the model is run. Exit code 1 if nothing would be rewritten.
    """
    from rich.console import Console

    from mhc_compile.cli.targets import load_target, parse_settings
    from mhc_compile.explanation import explain
    from mhc_compile.report import render

    model, args, kwargs = load_target(target, parse_settings(settings))
    model.train(not evaluate)
    explanation = explain(model, *args, options=parse_settings(options), **kwargs)
    if as_json:
        click.echo(json.dumps(explanation.to_dict(), indent=2))
    else:
        Console().print(render(explanation, every=every))
    if not explanation.sites:
        raise click.exceptions.Exit(1)
