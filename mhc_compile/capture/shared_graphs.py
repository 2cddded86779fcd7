"""Which modules of a model run a graph: reports count every block, and Dynamo traces only the first of those that look the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.capture.equivalent_blocks import equivalent_blocks

if TYPE_CHECKING:
    from types import CodeType

    from torch import nn

    from mhc_compile.capture.frame import Frame

__all__ = ["Sharing", "below"]


class Sharing:
    """Asked for every graph of one capture of `model`, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._foreseen: set[tuple[CodeType, str]] = set()

    def modules(self, root: nn.Module | None, frame: Frame) -> list[str]:
        """The paths below the model of the modules that run the graph that is being traced for `root`; "" is the model itself."""
        if root is None or root is self.model:
            return [""]
        code = frame.code
        paths = [self._paths.get(id(module), "") for module in (root, *equivalent_blocks(root, frame).others.values())]
        # It was not so like its sibling that it could use the graph.
        if (code, paths[0]) in self._foreseen:
            self._foreseen.discard((code, paths[0]))
            return []
        fresh = [paths[0], *(path for path in paths[1:] if (code, path) not in self._foreseen)]
        self._foreseen.update((code, path) for path in fresh[1:])
        return fresh


def below(module: str, path: str) -> str:
    """`path` below `module`, both dotted."""
    return ".".join(part for part in (module, path) if part)
