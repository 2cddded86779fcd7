"""Traces a model as the compiled call would, without running it."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import CaptureError, MhcError
from mhc_compile.passes.analysis.op_info import is_random, written_operands

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType


__all__ = ["Probe", "ResultAnnotator", "capture", "probe"]

log = logging.getLogger(__name__)

#: Compiled versions of one model. Beyond Dynamo's usual 8 it would run as it is, and nothing would
#: be seen of it.
_VERSIONS = 1_000_000


class ResultAnnotator(Protocol):
    """What a compiled graph would write into the autograd history of its results."""

    def __bool__(self) -> bool: ...

    def write(self, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Write it, for one call of the graph."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_graph: Callable[[torch.fx.GraphModule, list[Any]], ResultAnnotator],
) -> int:
    """Hands every graph that Dynamo makes of `model(*args, **kwargs)` to `on_graph`, with its example inputs, while it is being traced.

    No operation of the model runs inside a graph, but for those on integers alone: where a graph
    would be executed, tensors of the right shapes, filled with zeros, are returned, so that a model
    that breaks into several graphs is seen to its end. Gradients are enabled, as in training, and
    the zeros have a history, by which a later graph can tell what they were computed from. The
    model's compiled versions, if it has any, stay as they are.

    Args:
        model: any module.
        args: its inputs.
        kwargs: its inputs by name.
        on_graph: gets each graph, and returns what the graph would leave in the history of its
            results.

    Returns:
        The number of graphs.

    Raises:
        CaptureError: the model cannot be traced with these inputs; the cause is chained.
        MhcError: whatever `on_graph` raised.
    """
    graphs = 0

    def look(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return _stub(graph_module, on_graph(graph_module, inputs))

    try:
        with torch.enable_grad():
            probe(model, look, args, kwargs)
    except MhcError:
        raise
    except Exception as error:
        shown = ", ".join([*map(_show, args), *(f"{name}={_show(value)}" for name, value in kwargs.items())])
        raise CaptureError(
            f"{type(model).__name__} could not be traced with the inputs ({shown}): {_cause(error)}."
            " Give the inputs that model(...) takes"
        ) from error
    return graphs


def probe(
    model: nn.Module,
    backend: Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls `torch.compile(model, backend=backend)` once and leaves Dynamo's caches as they were: the model's compiled versions stay."""
    with Probe(model, backend) as call:
        return call(*args, **kwargs)


class Probe:
    """`torch.compile(model, backend=backend)` beside the model's compiled versions, which stay, until it is closed; a context manager."""

    def __init__(
        self, model: nn.Module, backend: Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]
    ) -> None:
        self._model = model
        self._single = _SingleUse(backend)
        self._call = _torch.isolated_compile(model, self._single, recompile_limit=_VERSIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled model; errors of this package come as themselves."""
        try:
            with _torch.whole_graphs(), _torch.uncompiled(self._model):
                return self._call(*args, **kwargs)
        except _torch.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, MhcError):
                raise error.inner_exception from None
            raise

    def close(self) -> None:
        """Leaves Dynamo's caches as they were."""
        self._single.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _SingleUse:
    """A backend for a while.

    Dynamo keeps a backend as long as the code that it compiled, so this one can let go of what it
    holds.
    """

    def __init__(self, backend: Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]) -> None:
        self.backend: Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]] | None = backend
        self._fresh: list[CodeType] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        assert self.backend is not None
        code = _torch.frame_code()
        if not _torch.has_compiled(code):
            self._fresh.append(code)
        return self.backend(graph_module, inputs)

    def close(self) -> None:
        """Forgets the backend, and every entry of code that only this call compiled."""
        self.backend = None
        for code in self._fresh:
            _torch.forget_compiled(code, all_entries=True)


def _stub(graph_module: torch.fx.GraphModule, notes: ResultAnnotator | None) -> Callable[..., Any]:
    nodes = list(graph_module.graph.nodes)
    positions = {node: position for position, node in enumerate(n for n in nodes if n.op == "placeholder")}

    def recipe(node: torch.fx.Node) -> Any:
        if node in positions:
            return _Input(positions[node])
        return _Fake(node, node.meta.get("example_value"), _sources(node, positions))

    recipes: Any = torch.fx.map_arg(nodes[-1].args[0], recipe)

    def run(*inputs: Any) -> Any:
        known = _integers(nodes, dict(zip(positions, inputs, strict=True)))

        def make(entry: Any) -> Any:
            if isinstance(entry, _Input):
                return inputs[entry.position]
            if isinstance(entry, _Fake):
                return (
                    known[entry.node]
                    if entry.node in known
                    else _connect(_concrete(entry.value), entry.sources, inputs)
                )
            return entry

        if not isinstance(recipes, (tuple, list)):
            return make(recipes)
        results = tuple(map(make, recipes))
        if notes:
            notes.write(inputs, results)
        return results

    return run


class _Zeros(torch.autograd.Function):
    """Zeros that are said to be computed from other tensors."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *sources: Tensor) -> Tensor:  # noqa: ARG004 - the sources are there for their history
        """New zeros: a view of others could not be written in place, as the model may want to."""
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ARG004
        """Never called: nothing is trained on zeros."""
        raise AssertionError("the backward of a capture")


def _connect(value: Any, positions: tuple[int, ...], inputs: tuple[Any, ...]) -> Any:
    sources = [
        source for position in positions if isinstance(source := inputs[position], Tensor) and source.requires_grad
    ]
    if not isinstance(value, Tensor) or not value.requires_grad or not sources:
        return value
    return _Zeros.apply(value.detach(), *sources)


class _Input:
    def __init__(self, position: int) -> None:
        self.position = position


class _Fake:
    def __init__(self, node: torch.fx.Node, value: Any, sources: tuple[int, ...]) -> None:
        self.node, self.value, self.sources = node, value, sources


def _sources(node: torch.fx.Node, positions: dict[torch.fx.Node, int]) -> tuple[int, ...]:
    """The inputs of the graph that `node` is computed from."""
    seen: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack.extend(one.all_input_nodes)
    return tuple(position for placeholder, position in positions.items() if placeholder in seen)


def _integers(nodes: list[torch.fx.Node], inputs: dict[torch.fx.Node, Any]) -> dict[torch.fx.Node, Any]:
    """The results that are integers or truth values and are computed from integers alone: token counts, masks, conditions.

    A model that breaks its graph to look at one of them ("are there as many images as image
    tokens?") would be led astray by a zero. They are cheap, have no gradient, and nothing of the
    model's weights goes into them.
    """
    known = {node: value for node, value in inputs.items() if _is_exact(value)}
    for node in nodes:
        if node.op not in {"call_function", "call_method"} or not node.all_input_nodes:
            continue
        if is_random(node) or written_operands(node) or not all(operand in known for operand in node.all_input_nodes):
            continue
        args, kwargs = torch.fx.map_arg(node.args, known.get), torch.fx.map_arg(node.kwargs, known.get)
        try:
            call: Any = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
            value = call(*args, **kwargs) if node.op == "call_function" else call(*args[1:], **kwargs)
        except Exception:  # what cannot be computed here gets a stand-in, as every other result does
            log.debug("%s could not be computed from integers", node, exc_info=True)
            continue
        if _is_exact(value):
            known[node] = value
    return known


def _is_exact(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_meta or value.is_floating_point() or value.is_complex())
    return isinstance(value, (bool, int, torch.Size))


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


#: How Dynamo quotes the error of an operation that failed on fake tensors.
_QUOTED = re.compile(r"got (\w+\(.*\))")


def _cause(error: BaseException) -> str:
    """The one line of a Dynamo error that tells a user what is wrong with the inputs."""
    if isinstance(error, _torch.BackendCompilerFailed):
        # The wrapper's first line names the backend and not the trouble.
        error = error.inner_exception
    quoted = _QUOTED.search(str(error))
    if quoted:
        return quoted.group(1)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"
