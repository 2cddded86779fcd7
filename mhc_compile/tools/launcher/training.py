"""What a program below `mhc run` trained and saved: the second half of the last report."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from mhc_compile._torch import program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

#: The number of names in a message.
_SHOWN = 3


@dataclass
class Training:
    """A summary that can be sent from a child to its parent."""

    groups: dict[str, int] = field(default_factory=dict)  # parameters by "AdamW group 0"
    untrained: list[str] = field(default_factory=list)  # trainable parameters in no optimizer
    saved: dict[str, int] = field(default_factory=dict)  # hyper-connections by file
    connections: int = 0  # of all models

    def sentence(self) -> str:
        """Return "trained: ...; saved: ..."; "" if nothing was trained or saved."""
        parts = []
        if self.groups:
            parts.append(
                "trained: " + ", ".join(f"{count} parameters in {group}" for group, count in self.groups.items())
            )
        if self.untrained:
            shown = ", ".join(self.untrained[:_SHOWN]) + (", ..." if len(self.untrained) > _SHOWN else "")
            parts.append(f"WARNING: {len(self.untrained)} parameters in no optimizer ({shown})")
        if self.saved:
            last, count = list(self.saved.items())[-1]
            others = len(self.saved) - 1
            more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
            # Several models may have a file each.
            whole = "all" if count >= self.connections else f"{count} of {self.connections}"
            parts.append(f"saved: {whole} hyper-connections in {last}{more}")
        return "; ".join(parts)


class TrainingReport:
    """Follows optimizer steps and saved files. `models()` are the models that are compiled."""

    def __init__(self, models: Callable[[], Iterable[nn.Module]], changed: Callable[[Training], None]) -> None:
        self.training = Training()
        self._models, self._changed = models, changed
        self._places = WeakTensorKeyDictionary()  # the names of groups by parameter
        self._sizes: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._steps: list[set[torch.Tensor]] = []  # what was updated within each step that is running
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        program.after_saving(self.after_saving)

    def _before_step(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._steps.append(set())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling():
            return
        inside = self._steps.pop()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._sizes.get(optimizer) == len(parameters):
            return
        self._sizes[optimizer] = len(parameters)
        if self._steps:
            self._steps[-1].update(parameters)
        if inside.issuperset(parameters):
            return  # it only calls the steps of others, like the container of torchtitan
        for number, group in enumerate(optimizer.param_groups):
            name = f"{type(optimizer).__name__} group {number}"
            for parameter in group["params"]:
                self._places[parameter] = [*self._places.get(parameter, []), name]
        self._update()

    def _update(self) -> None:
        from mhc_compile.attachment.model_tree import connections

        groups: Counter[str] = Counter()
        untrained, found = [], 0
        for model in self._models():
            for path, connection in connections(model).items():
                found += 1
                for name, parameter in connection.named_parameters():
                    if not parameter.requires_grad:
                        continue
                    places = list(dict.fromkeys(self._places.get(parameter, [])))
                    groups.update(places)
                    if not places:
                        untrained.append(f"{path}.{name}")
        self.training.groups, self.training.untrained = dict(groups), untrained
        self.training.connections = max(found, self.training.connections)
        self._changed(self.training)

    def after_saving(self, content: Any, file: Any) -> None:
        """Count the hyper-connections in a saved object."""
        found = _count(content)
        if found and self.training.connections:
            name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else "a stream"
            self.training.saved[str(name)] = found
            self._changed(self.training)


def _count(content: Any, depth: int = 3) -> int:
    """Return the number of hyper-connections in a state dict, or in those inside a mapping."""
    if not isinstance(content, Mapping) or depth == 0:
        return 0
    tensors = [str(name) for name, value in content.items() if isinstance(value, torch.Tensor)]
    own = sum(name.endswith(".phi") and ".mhc." in f".{name}" for name in tensors)
    return own + sum(_count(value, depth - 1) for value in content.values())
