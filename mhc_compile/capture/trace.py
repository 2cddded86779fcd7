"""Trace a model as the compiled call would, without running it."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.errors import CaptureError, MhcError
from mhc_compile.passes.analysis.dependence import closure
from mhc_compile.passes.analysis.op_info import is_random, written_operands

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType

    from torch.fx import GraphModule, Node

    Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]
    GraphCallback = Callable[[GraphModule, list[Any]], "ResultAnnotator"]

log = logging.getLogger(__name__)


class ResultAnnotator(Protocol):
    """The annotations that a compiled graph adds to the autograd history of its results."""

    def __bool__(self) -> bool: ...

    def write(self, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """Annotate the results of one call of the graph."""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], on_graph: GraphCallback) -> int:
    """Call `on_graph` with every graph that Dynamo makes of `model(*args, **kwargs)`; count them.

    Graphs are not run, except for operations on integers. They return zeros of the right shapes,
    so that a model that breaks into several graphs is traced to its end. Gradients are enabled, as
    in training, and the zeros have a history that tells a later graph their origin. Compiled
    versions of the model are not affected.

    `on_graph` gets each graph and its example inputs while it is traced, and returns annotations.

    Raises:
        CaptureError: the model cannot be traced with these inputs; the cause is chained.
        MhcError: raised by `on_graph`.
    """
    graphs = 0

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return _stub(graph_module, on_graph(graph_module, inputs))

    try:
        with torch.enable_grad(), contextlib.closing(Probe(model, backend)) as probe:
            probe(*args, **kwargs)
    except MhcError:
        raise
    except Exception as error:
        shown = ", ".join([*map(_show, args), *(f"{name}={_show(value)}" for name, value in kwargs.items())])
        raise CaptureError(
            f"{type(model).__name__} could not be traced with the inputs ({shown}): {_cause(error)}."
            " Give the inputs that model(...) takes"
        ) from error
    return graphs


class Probe:
    """`torch.compile(model, backend=backend)` that keeps other compiled versions of the model."""

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self._model, self._backend = model, backend
        self._compiled: list[CodeType] = []
        self._call = _torch.isolated_compile(model, self._trace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled model. Errors of this package are raised without Dynamo's wrapper."""
        try:
            with _torch.whole_graphs(), _torch.uncompiled(self._model):
                return self._call(*args, **kwargs)
        except _torch.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, MhcError):
                raise error.inner_exception from None
            raise

    def _trace(self, graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        code = _torch.frame_code()
        if not _torch.has_compiled(code):
            self._compiled.append(code)
        return self._backend(graph_module, inputs)

    def close(self) -> None:
        """Restore Dynamo's caches: release all entries of code that was compiled here alone."""
        for code in self.__dict__.pop("_compiled", ()):
            _torch.forget_compiled(code, all_entries=True)
        self.__dict__.clear()  # Dynamo keeps a backend as long as the compiled code


def _stub(graph_module: GraphModule, annotations: ResultAnnotator | None) -> Callable[..., Any]:
    """Return a callable like the graph that returns stand-ins for the results."""
    nodes = list(graph_module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    outputs: Any = nodes[-1].args[0]
    # Dynamo deletes the example values when it is done with the graph.
    examples = {node: node.meta.get("example_value") for node in nodes[-1].all_input_nodes}
    behind = {node: closure([node], lambda each: each.all_input_nodes).intersection(placeholders) for node in examples}

    def run(*inputs: Any) -> Any:
        values = dict(zip(placeholders, inputs, strict=True))
        known = values | _integers(nodes, values)

        def stand_in(node: Node) -> Any:
            if node in known:
                return known[node]
            sources = [values[source] for source in placeholders if source in behind[node]]
            return _connect(_concrete(examples[node], sources), sources)

        results: Any = torch.fx.map_arg(outputs, stand_in)
        if annotations and isinstance(results, (tuple, list)):
            annotations.write(inputs, results)
        return results

    return run


class _Zeros(torch.autograd.Function):
    """Zeros with a history that contains other tensors."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *sources: Tensor) -> Tensor:  # noqa: ARG004
        """Return new zeros, because a view of others could not be written in place."""
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ARG004
        """Raise: nothing is trained on zeros."""
        raise AssertionError("the backward of a capture")


def _connect(value: Any, inputs: list[Any]) -> Any:
    sources = [source for source in inputs if isinstance(source, Tensor) and source.requires_grad]
    if not isinstance(value, Tensor) or not value.requires_grad or not sources:
        return value
    return _Zeros.apply(value.detach(), *sources)


def _integers(nodes: list[Node], inputs: dict[Node, Any]) -> dict[Node, Any]:
    """Compute the integers and booleans that depend on integers alone: token counts, masks.

    A model that breaks its graph to branch on one of them ("as many images as image tokens?") would
    take the wrong branch with a zero.
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
        except Exception:  # it gets a stand-in, as other results do
            log.debug("%s could not be computed from integers", node, exc_info=True)
            continue
        if _is_exact(value):
            known[node] = value
    return known


def _is_exact(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_meta or value.is_floating_point() or value.is_complex())
    return isinstance(value, (bool, int, torch.Size))


def _concrete(value: Any, sources: list[Any]) -> Any:
    jagged: list[Any] = [one for one in sources if isinstance(one, Tensor) and one.is_nested]
    if isinstance(value, Tensor) and value.is_nested and jagged:  # its rows are as long as those of an input
        rows = jagged[0].values().new_zeros((jagged[0].values().shape[0], *value.shape[2:]), dtype=value.dtype)
        return torch.nested.nested_tensor_from_jagged(rows, jagged[0].offsets()).requires_grad_(value.requires_grad)
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


#: Dynamo's quote of an error of an operation on fake tensors.
_QUOTED = re.compile(r"got (\w+\(.*\))")


def _cause(error: BaseException) -> str:
    """Return the line of a Dynamo error that says what is wrong with the inputs."""
    if isinstance(error, _torch.BackendCompilerFailed):
        error = error.inner_exception  # the wrapper names only the backend
    quoted = _QUOTED.search(str(error))
    if quoted:
        return quoted.group(1)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"
