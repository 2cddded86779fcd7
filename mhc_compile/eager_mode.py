"""`mhc_compile.eager`, operation by operation, and `plain`, without hyper-connections."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from mhc_compile import _torch, backend
from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.attachment.sites import detach
from mhc_compile.compilation.inner_compiler import CountedGraph
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import warn
from mhc_compile.graph_breaks.runtime import StreamBoundary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def eager(model: nn.Module, *, options: Mapping[str, Any] | Options | None = None) -> nn.Module:
    """Return the model with its hyper-connections, run without a compiler, for debugging.

    The result shares class, attributes, parameters, buffers, hooks and training mode with `model`;
    only calls differ. `eager(model)(x)` runs the residual streams, where `model(x)` computes plain
    adds. Methods that call the model, such as `generate` of transformers, run the streams too.
    Versions compiled by `torch.compile` are not affected. There is no recompile limit, so shapes
    may keep changing.

    Dynamo still finds the residual adds, but its graph is run by Python: autograd's anomaly mode
    names the operation that made a nan, and `torch._higher_order_ops.print("{}", x)` in a block
    prints. So do `print`, breakpoints and anything else that breaks the graph: streams continue
    after a break. A warning says if hyper-connections are left out.

    Args:
        model: any module, compiled or not. Without hyper-connections, the first call attaches them.
        options: as for `torch.compile(model, backend="mhc", options=options)`; `inner_backend` is
            "eager".

    Raises:
        OptionError: the options are wrong.
    """
    target, parsed = unwrap(model), replace(Options.parse(options), inner_backend="eager")
    kind = _eager_class(type(target))
    other = kind.__new__(kind)
    object.__setattr__(other, "__dict__", target.__dict__)
    object.__setattr__(other, "_mhc_behind", target)
    object.__setattr__(other, "_mhc_run", _Run(target, parsed))
    return other  # type: ignore[no-any-return]


def plain(model: nn.Module) -> nn.Module:
    """Return the plain model, without hyper-connections, that shares the other parameters.

    It is a copy of the modules, not of their parameters and buffers: training one trains both. Its
    state dict is that of a model that never had hyper-connections. `model` is not changed.

    Args:
        model: any module, compiled or not.
    """
    target = unwrap(model)
    memo: dict[int, Any] = {id(value): value for slots in _torch.tensor_slots(target) for value in slots.values()}
    for connection in connections(target).values():
        memo[id(connection)] = None
    copied: nn.Module = copy.deepcopy(target, memo)
    detach(copied)
    return copied


class _Run:
    """Runs a model on streams and records which of its hyper-connections were used."""

    def __init__(self, model: nn.Module, options: ResolvedOptions) -> None:
        self.model, self.options = model, options
        self._used: set[int] = set()
        self._traced = self._again = self._warned = False
        self._call = _torch.isolated_compile(model, self._backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._traced = False
        with _torch.uncompiled(self.model):
            result = self._call(*args, **kwargs)
        # A branch split by a graph break works from the second call on: no warning in the first.
        if self._again and not self._warned:
            self._warn_of_idle()
        self._again = self._traced
        return result

    def _backend(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = backend.mhc(graph_module, inputs, options=self.options)
        self._traced = True
        rewritten = compiled.compiled if isinstance(compiled, (StreamBoundary, CountedGraph)) else compiled
        assert isinstance(rewritten, fx.GraphModule)
        placeholders = rewritten.graph.find_nodes(op="placeholder")
        read = [number for number, _ in enumerate(inputs) if placeholders[number].users]

        def run(*values: Any) -> Any:  # equivalent blocks share this graph with other parameters
            self._used.update(id(values[number]) for number in read)
            return compiled(*values)

        return run

    def _warn_of_idle(self) -> None:
        every = connections(self.model)
        idle = [path for path, connection in every.items() if id(connection.phi) not in self._used]
        if idle:
            self._warned = True
            warn(
                f"{len(idle)} of the {len(every)} hyper-connections of {type(self.model).__name__} had no part in this"
                f" call ({idle[0]}, ...): their residual adds ran as plain adds. Something breaks the graph between"
                ' them, or they belong to another call; TORCH_LOGS="graph_breaks" shows the former',
                repeat=True,
            )


class _EagerModel:
    """The methods that differ from the model's. State is in slots: `__dict__` is the model's."""

    __slots__ = ("_mhc_behind", "_mhc_run")

    _mhc_behind: Any
    _mhc_run: _Run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mhc_run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return eager(copy.deepcopy(self._mhc_behind, memo), options=self._mhc_run.options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return functools.partial(eager, options=self._mhc_run.options), (self._mhc_behind,)


def _eager_class(kind: type[nn.Module]) -> Any:
    names = {"__slots__": (), "__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_EagerModel, kind), names)
