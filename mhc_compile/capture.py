"""Traces a model as the compiled call would, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import CaptureError, MhcError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["capture"]


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_graph: Callable[[torch.fx.GraphModule, list[Any]], None],
) -> int:
    """Hands every graph that Dynamo makes of `model(*args, **kwargs)` to `on_graph`, with its example inputs, while it is being traced.

    No operation of the model runs inside a graph: where a graph would be executed, tensors of the right shapes, filled with zeros, are returned, so
    that a model that breaks into several graphs is seen to its end. Gradients are enabled, as in training. The model's compiled versions, if it
    has any, stay as they are.

    Returns:
        The number of graphs.

    Raises:
        CaptureError: the model cannot be traced with these inputs; the cause is chained.
        MhcError: whatever `on_graph` raised.
    """
    backend = _Capture(on_graph)
    try:
        with torch.enable_grad():
            _torch.isolated_compile(model, backend)(*args, **kwargs)
    except MhcError:
        raise
    except Exception as error:
        if backend.failure is not None:
            raise backend.failure from None
        shown = ", ".join([*map(_show, args), *(f"{name}={_show(value)}" for name, value in kwargs.items())])
        raise CaptureError(
            f"{type(model).__name__} could not be traced with the inputs ({shown}): {type(error).__name__}: {_first_line(error)}."
            " Give the inputs that model(...) takes"
        ) from error
    finally:
        backend.close()
    return backend.graphs


class _Capture:
    """A backend that looks and does not compile."""

    def __init__(self, on_graph: Callable[[torch.fx.GraphModule, list[Any]], None]) -> None:
        self.on_graph: Callable[[torch.fx.GraphModule, list[Any]], None] | None = on_graph
        self.failure: MhcError | None = None
        self.graphs = 0
        self._fresh: list[Any] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert self.on_graph is not None
        code = _torch.frame_code()
        if not _torch.has_compiled(code):
            self._fresh.append(code)
        self.graphs += 1
        try:
            self.on_graph(graph_module, inputs)
        except MhcError as error:
            self.failure = error
            raise
        return _stub(graph_module)

    def close(self) -> None:
        """Dynamo keeps a backend as long as the code that it compiled: let go of the model, and of the entries where only we made any."""
        self.on_graph = None
        for code in self._fresh:
            _torch.forget_compiled(code, all_entries=True)


def _stub(graph_module: torch.fx.GraphModule) -> Callable[..., Any]:
    nodes = list(graph_module.graph.nodes)
    positions = {node: position for position, node in enumerate(n for n in nodes if n.op == "placeholder")}
    recipes = torch.fx.map_arg(nodes[-1].args[0], lambda n: _Input(positions[n]) if n in positions else _Fake(n.meta.get("example_value")))

    def run(*inputs: Any) -> Any:
        def make(recipe: Any) -> Any:
            if isinstance(recipe, _Input):
                return inputs[recipe.position]
            return _concrete(recipe.value) if isinstance(recipe, _Fake) else recipe

        return tuple(map(make, recipes)) if isinstance(recipes, (tuple, list)) else make(recipes)

    return run


class _Input:
    def __init__(self, position: int) -> None:
        self.position = position


class _Fake:
    def __init__(self, value: Any) -> None:
        self.value = value


def _concrete(value: Any) -> Any:
    if isinstance(value, Tensor):
        zeros = torch.zeros([int(size) for size in value.shape], dtype=value.dtype, device=value.device)
        return zeros.requires_grad_(value.requires_grad)
    if isinstance(value, torch.SymInt):
        return int(value)
    return value


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no message"
