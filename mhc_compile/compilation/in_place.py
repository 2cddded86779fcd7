"""Run a model with hyper-connections on streams wherever it is called.

Every module that contains hyper-connections and can be called is *in place*. Its call runs

    in a trace of Dynamo           the forward, traced with its caller
    in code that torch.compile     the forward; the compiler gets the streams
      runs, of any backend           (`other_compilers`)
    in a trace of torch.export     the forward; the program is rewritten afterwards
    under vmap, grad, make_fx,     a graph on streams, with the mode suspended while Dynamo traces
      jit.trace, dispatch modes
    elsewhere                      a graph on streams, run operation by operation; in a planned
                                     model compiled by its inner backend

A deep copy and an unpickled model are in place as well, as they are not after `model.compile()`.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, IN_PLACE, HyperConnections, can_be_called, connections, unwrap
from mhc_compile.compilation.inner_compiler import run_eagerly
from mhc_compile.errors import CaptureError, MhcError, OutsideCallError
from mhc_compile.passes import run_passes
from mhc_compile.passes.transforms.lower_to_aten import LowerOperators

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from mhc_compile.config.options import ResolvedOptions

    #: Called with a graph, its inputs, options and `attach=`.
    CompileGraph = Callable[..., Callable[..., Any]]


def put_in_place(model: nn.Module, options: ResolvedOptions, compile_graph: CompileGraph) -> None:
    """Make every module of `model` with hyper-connections inside run on streams when called.

    `compile_graph(graph, inputs, options)` is what a backend does with a captured graph.
    """
    _torch.after_compiling_in_place(_keep_given)
    _torch.guard_on_forward_pre_hooks()
    for module in _modules_with_connections(model):
        if IN_PLACE not in module.__dict__:
            module.__dict__[IN_PLACE] = InPlace(module, options, compile_graph)


def compile_in_place(model: nn.Module, options: ResolvedOptions, compile_graph: CompileGraph) -> None:
    """Compile `model`, and its parts that contain blocks with hyper-connections, in place.

    A tower that a method calls by itself (`encode_image`) thus is compiled, too. Within a compiled
    call, parts are traced with it.
    """
    for module in _modules_with_connections(model):
        if not isinstance(getattr(module, CONTAINER, None), HyperConnections):
            if IN_PLACE in module.__dict__:
                module.__dict__[IN_PLACE].remove()
            module.__dict__[IN_PLACE] = InPlace(module, options, compile_graph, compiled=True, whole=module is model)
    put_in_place(model, options, compile_graph)


def _keep_given(module: nn.Module) -> None:
    if IN_PLACE in module.__dict__:
        module.__dict__[IN_PLACE].keep_given()


def _modules_with_connections(model: nn.Module) -> list[nn.Module]:
    """Return the modules that can be called and contain hyper-connections."""
    paths = [path.split(".") for path in connections(model)]
    inside = {".".join(path[:length]) for path in paths for length in range(len(path))}
    return [module for path, module in unwrap(model).named_modules() if path in inside and can_be_called(module)]


class InPlace:
    """The attribute of a module that is in place; copying it puts the copy in place.

    `compiled`: whether calls are compiled by the inner backend. `whole` says that no chain goes on
    outside the module: the next model begins with copies.
    """

    def __init__(
        self,
        module: nn.Module,
        options: ResolvedOptions,
        compile_graph: CompileGraph,
        *,
        compiled: bool = False,
        whole: bool = False,
    ) -> None:
        self.module, self.options, self.compiled, self.whole = module, options, compiled, whole
        self.compile_graph = compile_graph
        own = options if compiled else replace(options, inner_backend="eager")
        # What `module.compile()` has set stays in use.
        self._given: Callable[..., Any] | None = _torch.compiled_call(module)
        self._call: Any = self._given or _torch.compile_call(module, _Backend(own, compile_graph, attach=compiled))
        self._run_under_modes = _UnderModes(module, options, compile_graph)
        self._dispatch = _torch.dispatch_calls(module, self._choose)

    @property
    def is_given(self) -> bool:
        """Whether `module.compile()` has compiled the module."""
        return self._given is not None

    def remove(self) -> None:
        """Let calls of the module run as they did before."""
        if _torch.compiled_call(self.module) is self._dispatch:
            _torch.set_compiled_call(self.module, self._given)

    def _choose(self, from_compiled_code: bool) -> Callable[..., Any] | None:
        if torch.compiler.is_exporting():
            return None
        if _torch.modes_are_active():
            return self._run_under_modes
        if _torch.is_symbolic_trace():
            return None
        if self.compiled or self._given is not None:
            return self._call  # type: ignore[no-any-return]
        if from_compiled_code or _is_compiled_in_parts(self.module):
            return None
        if self.options.outside_calls == "error":
            raise OutsideCallError(
                f"{type(self.module).__name__} has hyper-connections and was called outside torch.compile, and"
                " outside_calls='error' forbids that. Call what torch.compile returned; mhc_compile.eager(model) runs"
                " hyper-connections without compiling, mhc_compile.plain(model) is the model without them"
            )
        return self._operation_by_operation

    def keep_given(self) -> None:
        """Keep what `module.compile()` has just set."""
        self._call = self._given = _torch.compiled_call(self.module)
        self._dispatch = _torch.dispatch_calls(self.module, self._choose)

    def _operation_by_operation(self, *args: Any, **kwargs: Any) -> Any:
        with _torch.default_stance():
            return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace | None:
        copy = memo.get(id(self.module))  # it exists already, and its attributes follow
        return InPlace(copy, **self._settings(self.options)) if copy is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # A function as inner backend may not be picklable, and changes no results.
        inner = "inductor" if callable(self.options.inner_backend) else self.options.inner_backend
        return {"module": self.module, **self._settings(replace(self.options, inner_backend=inner))}

    def _settings(self, options: ResolvedOptions) -> dict[str, Any]:
        settings = {"compiled": self.compiled, "whole": self.whole}
        return {"options": options, "compile_graph": self.compile_graph, **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        InPlace.__init__(self, **state)


def _is_compiled_in_parts(module: nn.Module) -> bool:
    """Return whether every hyper-connection is in a part that its user has compiled."""
    parts = [_compiled_part(child) for child in module.children()]
    return CONTAINER not in dict(module.named_children()) and False not in parts and True in parts


def _compiled_part(module: nn.Module) -> bool | None:
    """Return whether a part with hyper-connections is compiled; None for one without any."""
    in_place = module.__dict__.get(IN_PLACE)
    if unwrap(module) is not module or (in_place is not None and in_place.is_given):
        return True
    if in_place is not None:
        return _is_compiled_in_parts(module)
    parts = [part for child in module.children() if (part := _compiled_part(child)) is not None]
    return all(parts) if parts else None


class _Backend:
    """The backend with fixed options."""

    takes_whole_graphs = True  # see `mhc_compile.backend`
    __name__ = "mhc"

    def __init__(self, options: ResolvedOptions, compile_graph: CompileGraph, *, attach: bool) -> None:
        self.options, self.compile_graph, self.attach = options, compile_graph, attach

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            return self.compile_graph(graph_module, inputs, self.options, attach=self.attach)
        except MhcError as error:
            _torch.raise_through_dynamo(error)
            raise


class _Call(threading.local):
    """The call of this thread: what puts the modes on, and wrapped tensors by their stand-ins.

    `graphs` is the number of graphs that ran.
    """

    resume: Callable[[], AbstractContextManager[None]]
    wrapped: dict[int, Tensor]
    graphs: int


class _UnderModes:
    """Calls of a module under modes: the graph gets the tensors of the caller, in their modes."""

    def __init__(self, module: nn.Module, options: ResolvedOptions, compile_graph: CompileGraph) -> None:
        self.module = module
        self._now = _Call()
        backend = _Backend(replace(options, inner_backend=_lowered), compile_graph, attach=False)
        # Dynamo keeps a backend as long as the code of the class: it must not hold the module.
        compile_ = _ModesBackend(backend, self._now)
        self._call = _torch.compile_call(module, compile_)
        # Code between two graphs would compute with the stand-ins, whose values mean nothing.
        self._whole = _torch.compile_call(module, compile_, fullgraph=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slots = [
            (slot, name, value)
            for slot in _torch.tensor_slots(self.module)
            for name, value in slot.items()
            if _torch.needs_stand_in(value)
        ]
        makers: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        for value in (*_torch.tree_leaves((args, kwargs)), *(value for *_, value in slots)):
            if _torch.needs_stand_in(value) and id(value) not in makers:
                makers[id(value)] = value, _torch.stand_in_for(value)
        with _torch.suspend_modes() as resume, _torch.default_stance():
            stand_ins = {key: make() for key, (_, make) in makers.items()}
            wrapped = {id(stand_in): makers[key][0] for key, stand_in in stand_ins.items()}
            before = self._now.__dict__.copy()
            self._now.resume, self._now.wrapped, self._now.graphs = resume, wrapped, 0
            try:
                for slot, name, value in slots:
                    slot[name] = stand_ins[id(value)]
                args, kwargs = _torch.tree_map_only(Tensor, lambda x: stand_ins.get(id(x), x), (args, kwargs))
                result = (self._whole if wrapped else self._call)(*args, **kwargs)
                if wrapped and not self._now.graphs:
                    raise self._not_traced("it does not trace the call")
            except (MhcError, _torch.BackendCompilerFailed):
                raise
            except Exception as error:
                if wrapped and (not self._now.graphs or isinstance(error, _torch.TorchDynamoException)):
                    raise self._not_traced(str(error).strip().splitlines()[0]) from error
                raise
            finally:
                self._now.__dict__.update(before)
                for slot, name, value in slots:
                    if id(slot[name]) in wrapped:
                        slot[name] = value
        return _torch.tree_map_only(Tensor, lambda x: wrapped.get(id(x), x), result)

    def _not_traced(self, why: str) -> CaptureError:
        return CaptureError(
            f"{type(self.module).__name__} has hyper-connections, and under a transform (vmap, grad, make_fx, ...) its"
            f" call must be one graph. Dynamo stopped: {why}. Let it trace that code, or transform"
            " mhc_compile.plain(model), which has no hyper-connections"
        )


class _ModesBackend:
    """A backend whose graphs run on the tensors of the caller, with the modes on."""

    def __init__(self, backend: _Backend, now: _Call) -> None:
        self.backend, self.now = backend, now

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sizes = _sizes(graph_module.graph)
        graph = self.backend(graph_module, inputs)

        def run(*inputs: Any) -> Any:
            values = [self.now.wrapped.get(id(value), value) for value in inputs]
            for number, (position, axis) in sizes.items():
                values[number] = values[position].shape[axis]
            self.now.graphs += 1
            with self.now.resume():
                return graph(*values)

        return run


def _lowered(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG001 - as backends have it
    """Write operators as their references, for which every mode and transform has rules.

    It is interpreted: `jit.trace` compares traces with their source lines, and generated code has
    a number in its name.
    """
    graph = run_passes(graph_module.graph, (LowerOperators(),))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        node.op, node.target = "call_method", "size"  # vmap has no rule for the operator
    lowered = fx.GraphModule(graph_module, graph)
    return fx.Interpreter(run_eagerly(lowered)).run


def _sizes(graph: fx.Graph) -> dict[int, tuple[int, int]]:
    """Return, for each input that is a dynamic size, input and axis of a tensor of that size."""
    examples = [node.meta.get("example_value") for node in graph.find_nodes(op="placeholder")]
    known = {
        str(size): (position, axis)
        for position, example in enumerate(examples)
        if isinstance(example, Tensor)
        for axis, size in enumerate(example.shape)
        if not isinstance(size, int)
    }
    return {n: known[str(e)] for n, e in enumerate(examples) if isinstance(e, torch.SymInt) and str(e) in known}
