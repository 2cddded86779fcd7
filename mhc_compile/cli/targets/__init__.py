"""TARGET on the command line: a model with example inputs, which say how it is called.

package.module:factory, path/to/file.py:factory
                a function that returns (model, args) or (model, args, kwargs): `user_code`
file.pt2        a program that `torch.export.save` wrote: `user_code`
hf:MODEL_TYPE   a tiny random model: `transformers_models`, `tiny_config`, `example_inputs`
zoo:FAMILY      a model of the zoo

Opening a target runs its code: targets are trusted input. Weights (`weights`) need not be.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.cli.error_handling import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Target:
    """A model with example inputs: it is called as `model(*args, **kwargs)`."""

    name: str  # the target as written
    model: nn.Module | ExportedProgram  # a module, or an exported program
    args: tuple[Any, ...]  # example inputs
    kwargs: dict[str, Any]  # example inputs by name

    def set_mode(self, train: bool) -> None:
        """Set training or eval mode. An exported program keeps the mode that it was exported in."""
        from torch import nn

        if isinstance(self.model, nn.Module):
            self.model.train(train)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse `("hidden_size=256", "act=gelu")`; values are Python literals, else strings.

    Raises:
        TargetError: an entry has no `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise TargetError(f"{pair!r} is no setting; expected NAME=VALUE")
        settings[name] = parse_value(value)
    return settings


def parse_value(text: str) -> Any:
    """Return a Python literal, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def load_target(target: str, settings: Mapping[str, Any], *, full_size: bool = False, memory: bool = False) -> Target:
    """Load the model that `target` names (see the module's docstring), with example inputs.

    `settings` are fields of the config of an `hf:` target, or `layers` of a `zoo:` target;
    `full_size` builds an `hf:` target from its default config, on the meta device unless `memory`.

    Raises:
        TargetError: no such target; the message says what was tried and lists near names.
        FactoryError: the code that the target names raised.
    """
    kind, colon, name = target.partition(":")
    if kind == "hf" and colon:
        from mhc_compile.cli.targets import transformers_models

        return Target(target, *transformers_models.load(name, settings, full_size=full_size, memory=memory))
    if kind == "zoo" and colon:
        return Target(target, *_load_family(name, dict(settings)))
    if settings:
        raise TargetError(f"--set is for hf: and zoo: targets; {target!r} builds its model itself")
    from mhc_compile.cli.targets import user_code

    if target.endswith(".pt2"):
        return Target(target, *user_code.load_program(target))
    file, _, factory = target.rpartition(":")
    if not file or not factory:
        raise TargetError(
            f"{target!r} is no target; expected package.module:factory, path/to/file.py:factory, hf:MODEL_TYPE (hf:gpt2),"
            " file.pt2 or zoo:FAMILY (zoo:resnet)"
        )
    return Target(target, *user_code.load_factory(file, factory))


def _load_family(name: str, settings: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a model of the zoo, of 2 layers unless `settings` has "layers"."""
    from mhc_compile.tools import zoo

    layers = settings.get("layers", 2)
    if set(settings) - {"layers"} or not isinstance(layers, int) or layers < 1:
        raise TargetError(f"zoo: targets have one setting, layers=N with N >= 1; found {settings}")
    try:
        family = zoo.get(name)
    except zoo.UnknownFamilyError as error:
        raise TargetError(str(error)) from error
    return family.build(layers)
