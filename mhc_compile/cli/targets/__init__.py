"""What a command line may name as a model, one file for each kind.

| written | what it is | where |
|---|---|---|
| `package.module:factory`, `path/to/file.py:factory` | a function that returns `(model, args)` or `(model, args, kwargs)` | `factories` |
| `file.pt2` | a program that `torch.export.save` wrote, with its own example inputs | `programs` |
| `hf:MODEL_TYPE` | a tiny random model of an architecture of transformers | `transformers_models`, `shrinking`, `model_classes`, `example_inputs` |
| `zoo:FAMILY` | a model of the zoo | `families` |

The example inputs say how a model is called. Opening a target runs its code: targets are trusted input.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.cli.error_handling import FactoryError, TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["FactoryError", "Target", "TargetError", "load_target", "parse_settings"]


@dataclass(frozen=True)
class Target:
    """A model that a command line named, with example inputs: `model(*args, **kwargs)` is how it is called.

    Attributes:
        name: as it was written.
        model: a module, or an exported program.
        args: example inputs; those of a program are what it was exported with.
        kwargs: example inputs by name.
    """

    name: str
    model: nn.Module | ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def set_mode(self, train: bool) -> None:
        """Puts a module into training or eval mode. A program was exported in one of them and keeps it."""
        from torch import nn

        if isinstance(self.model, nn.Module):
            self.model.train(train)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("hidden_size=256", "act=gelu")` to a dict; values are Python literals where they parse as such, else strings.

    Raises:
        TargetError: an entry has no `=`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise TargetError(f"{pair!r} is no setting; expected NAME=VALUE")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def load_target(target: str, settings: Mapping[str, Any], *, full_size: bool = False, memory: bool = False) -> Target:
    """The model that `target` names, with example inputs.

    Args:
        target: see the module's docstring.
        settings: fields of the config of an `hf:` target, `layers` of a `zoo:` target.
        full_size: build an `hf:` target from its default config on the meta device instead of a tiny one with weights.
        memory: not on the meta device: the model will get weights.

    Raises:
        TargetError: no such target; the message says what was tried and lists near names.
        FactoryError: the code that the target names failed.
    """
    kind, colon, name = target.partition(":")
    if kind == "hf" and colon:
        from mhc_compile.cli.targets import transformers_models

        return Target(target, *transformers_models.load(name, settings, full_size=full_size, memory=memory))
    if kind == "zoo" and colon:
        from mhc_compile.cli.targets import families

        return Target(target, *families.load(name, settings))
    if settings:
        raise TargetError(f"--set is for hf: and zoo: targets; {target!r} builds its model itself")
    if target.endswith(".pt2"):
        from mhc_compile.cli.targets import programs

        return Target(target, *programs.load(target))
    file, _, factory = target.rpartition(":")
    if not file or not factory:
        raise TargetError(
            f"{target!r} is no target; expected package.module:factory, path/to/file.py:factory, hf:MODEL_TYPE (hf:gpt2), file.pt2"
            " or zoo:FAMILY (zoo:resnet)"
        )
    from mhc_compile.cli.targets import factories

    return Target(target, *factories.load(file, factory))
