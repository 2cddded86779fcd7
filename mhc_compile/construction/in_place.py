"""Compile a model in place, so that it runs on streams wherever it is called.

`model.compile()` of torch does this for one object: a deep copy (an average of weights) and an
unpickled model run uncompiled. Here they are compiled in place as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch, backend
from mhc_compile.attachment.model_tree import CONTAINER, IN_PLACE, HyperConnections, can_be_called, connections

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx, nn

    from mhc_compile.config.options import ResolvedOptions


def compile_in_place(model: nn.Module, options: ResolvedOptions) -> None:
    """Compile `model`, and its parts that contain blocks with hyper-connections, in place.

    A tower that a method calls by itself (`encode_image`) thus runs on streams, too. Within a
    compiled call, parts are traced with it.
    """
    owners = {module for module in model.modules() if isinstance(getattr(module, CONTAINER, None), HyperConnections)}
    for module in model.modules():
        if can_be_called(module) and module not in owners and any(connections(module)):
            module.__dict__[IN_PLACE] = InPlace(module, options, whole=module is model)


class InPlace:
    """An attribute of a module that is compiled in place; copying it compiles the copy.

    `whole` says that no chain goes on outside the module: the next model begins with copies.
    """

    def __init__(self, module: nn.Module, options: ResolvedOptions, *, whole: bool) -> None:
        self.module, self.options, self.whole = module, options, whole
        _torch.set_compiled_call(module, _Backend(options))

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace | None:
        copy = memo.get(id(self.module))  # it exists already, and its attributes follow
        return InPlace(copy, self.options, whole=self.whole) if copy is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # A function as inner backend may not be picklable, and changes no results.
        inner = "inductor" if callable(self.options.inner_backend) else self.options.inner_backend
        return {"module": self.module, "options": replace(self.options, inner_backend=inner), "whole": self.whole}

    def __setstate__(self, state: dict[str, Any]) -> None:
        InPlace.__init__(self, **state)


class _Backend:
    """The backend with fixed options."""

    takes_whole_graphs = True  # see `mhc_compile.backend`
    __name__ = "mhc"

    def __init__(self, options: ResolvedOptions) -> None:
        self.options = options

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return backend.mhc(graph_module, inputs, options=self.options)
