"""The modules that run each graph: Dynamo traces only the first of equivalent blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.capture.equivalent_blocks import equivalent_blocks

if TYPE_CHECKING:
    from types import CodeType

    from torch import nn

    from mhc_compile.capture.frame import Frame


class Sharing:
    """Assigns modules to the graphs of one capture of `model`, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._foreseen: set[tuple[CodeType, str]] = set()

    def modules(self, root: nn.Module | None, frame: Frame) -> list[str]:
        """Return the paths of the modules that run the graph traced for `root`; "" is the model."""
        if root is None or root is self.model:
            return [""]
        code = frame.code
        paths = [self._paths.get(id(module), "") for module in (root, *equivalent_blocks(root, frame).others.values())]
        # This block was predicted to share a graph that it could not use.
        if (code, paths[0]) in self._foreseen:
            self._foreseen.discard((code, paths[0]))
            return []
        fresh = [paths[0], *(path for path in paths[1:] if (code, path) not in self._foreseen)]
        self._foreseen.update((code, path) for path in fresh[1:])
        return fresh


def below(module: str, path: str) -> str:
    """Join two dotted paths, each maybe empty."""
    return ".".join(part for part in (module, path) if part)
