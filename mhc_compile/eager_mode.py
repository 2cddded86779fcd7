"""`mhc_compile.eager`: a model with its hyper-connections, run operation by operation."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from mhc_compile import _torch, backend
from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import warn
from mhc_compile.graph_breaks.runtime import StreamBoundary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["eager"]

#: Compiled versions of one model. The usual 8 are for programs that must be fast; beyond them the model would run without streams.
_VERSIONS = 1_000_000


def eager(model: nn.Module, *, options: Mapping[str, Any] | Options | None = None) -> nn.Module:
    """The model with its hyper-connections, without a compiler: for debugging, and for code whose shapes keep changing.

    What comes back is a second face of the same object: it has the same class and the same attributes, parameters, buffers, hooks and training
    mode (not copies of them), and only a call differs: `eager(model)(x)` runs the residual streams, where `model(x)` would compute plain adds.
    So methods that call the model themselves, such as `generate` of transformers, run the streams too. Versions of the model that
    `torch.compile` made are left alone, and so is their recompile limit; there is none here.

    Dynamo still finds the residual adds, but what runs is its graph, one operation after the other: autograd's anomaly mode names the operation
    that made a nan, and `torch._higher_order_ops.print("{}", x)` in a block prints. The builtin `print` of a tensor, a breakpoint, and whatever
    else breaks the graph work too: streams go on behind a graph break. A warning says so when hyper-connections are left out.

    Args:
        model: any module, or one that `torch.compile` returned. If it has no hyper-connections yet, the first call attaches them, as the first
            compiled call would.
        options: as for `torch.compile(model, backend="mhc", options=options)`; `inner_backend` is "eager".

    Raises:
        OptionError: the options are wrong.
    """
    target, parsed = unwrap(model), replace(Options.parse(options), inner_backend="eager")
    face = _face(type(target))
    other = face.__new__(face)
    object.__setattr__(other, "__dict__", target.__dict__)
    object.__setattr__(other, "_mhc_behind", target)
    object.__setattr__(other, "_mhc_run", _Run(target, parsed))
    return other  # type: ignore[no-any-return]


class _Run:
    """Calls of a model on streams, and whether all its hyper-connections took part."""

    def __init__(self, model: nn.Module, options: ResolvedOptions) -> None:
        self.model, self.options = model, options
        self._used: set[int] = set()
        self._traced = self._again = self._told = False
        self._call = _torch.isolated_compile(model, self._backend, recompile_limit=_VERSIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._traced = False
        with _torch.uncompiled(self.model):
            result = self._call(*args, **kwargs)
        # The two halves of a branch that a graph break cuts find each other in one call, and work together from the next one on.
        if self._again and not self._told:
            self._tell()
        self._again = self._traced
        return result

    def _backend(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = backend.mhc(graph_module, inputs, options=self.options)
        self._traced = True
        rewritten = compiled.compiled if isinstance(compiled, StreamBoundary) else compiled
        assert isinstance(rewritten, fx.GraphModule)
        placeholders = rewritten.graph.find_nodes(op="placeholder")
        read = [number for number, _ in enumerate(inputs) if placeholders[number].users]

        def run(*values: Any) -> Any:  # blocks that look the same share a graph: what takes part is known when it runs
            self._used.update(id(values[number]) for number in read)
            return compiled(*values)

        return run

    def _tell(self) -> None:
        every = connections(self.model)
        idle = [path for path, connection in every.items() if id(connection.phi) not in self._used]
        if idle:
            self._told = True
            warn(
                f"{len(idle)} of the {len(every)} hyper-connections of {type(self.model).__name__} had no part in this call ({idle[0]}, ...):"
                " their residual adds ran as plain adds. Something breaks the graph between them, or they belong to another call;"
                ' TORCH_LOGS="graph_breaks" shows the former',
                repeat=True,
            )


class _Face:
    """What the second face of a model does otherwise. Its own state is in slots: `__dict__` is the model's."""

    __slots__ = ("_mhc_behind", "_mhc_run")

    _mhc_behind: Any
    _mhc_run: _Run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mhc_run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return eager(copy.deepcopy(self._mhc_behind, memo), options=self._mhc_run.options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return functools.partial(eager, options=self._mhc_run.options), (self._mhc_behind,)


def _face(kind: type[nn.Module]) -> Any:
    names = {"__slots__": (), "__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Face, kind), names)
