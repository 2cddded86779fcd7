"""Forms in which a module or an exported program runs: plain, rewritten, by another compiler."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, connections, unwrap
from mhc_compile.attachment.sites import detach
from mhc_compile.backend import mhc
from mhc_compile.capture.tensor_tree import fresh
from mhc_compile.eager_mode import eager
from mhc_compile.export.rewrite import rewrite
from mhc_compile.inspection.explain.explain import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mhc_compile.config.options import ResolvedOptions


@dataclass
class Run:
    """A callable form of a copy of the model, with the number of graphs compiled for it so far."""

    call: Callable[..., Any]
    module: nn.Module
    graphs: int = 0

    def __post_init__(self) -> None:
        self._buffers = {name: fresh(value) for name, value in self.module.named_buffers()}

    def restore(self) -> None:
        """Restore the values that the buffers had when this run was made, before another call."""
        with torch.no_grad():
            for name, value in self.module.named_buffers():
                if name in self._buffers and value.shape == self._buffers[name].shape:
                    value.copy_(self._buffers[name])

    def connections(self, *, read_outs: bool = False) -> dict[str, tuple[nn.Parameter, ...]]:
        """Return phi (of learned read-outs, weight), bias and scale of each one, by path."""
        found = dict(self.module.named_parameters())
        first, end = ("weight", ".read_out.weight") if read_outs else ("phi", ".phi")
        paths = [
            name.removesuffix(f".{first}") for name in found if name.endswith(end) and CONTAINER in name.split(".")
        ]
        names = {path: [f"{path}.{part}" for part in (first, "bias", "scale")] for path in paths}
        return {
            path: tuple(found[name] for name in parts) for path, parts in names.items() if found.keys() >= set(parts)
        }


class _Module:
    """A module, compiled by `torch.compile(model, backend="mhc")`.

    `dtype` is the narrowest of its parameters, which bounds the accuracy; `attached` says whether
    it has hyper-connections already.
    """

    def __init__(self, model: nn.Module, options: ResolvedOptions) -> None:
        self._model, self._options = unwrap(model), options
        self.name = type(self._model).__name__
        self.dtype = _narrowest(self._model.parameters())
        self.attached = bool(connections(self._model))

    def planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Return the number of sites that a dry run finds."""
        return len(explain(self._copy(own=True), *args, options=self._options, **kwargs).sites)

    def plain(self, dtype: torch.dtype | None = None) -> Run:
        """Return the model without hyper-connections, in another dtype if given."""
        model = _to(self._copy(own=False), dtype)
        return Run(model, model)

    def rewritten(self, options: ResolvedOptions, *, own: bool = False) -> Run:
        """Return the compiled model on streams, with new hyper-connections or its `own`."""
        return _compiled(self._copy(own=own), options)

    def other(self, run: Run, options: ResolvedOptions, dtype: torch.dtype | None = None) -> Run:
        """Return a copy of a rewritten run that uses another compiler than that of `options`."""
        model = _to(copy.deepcopy(run.module), dtype)
        if options.inner_backend == "eager" and dtype is None:
            return _compiled(model, replace(options, inner_backend="aot_eager"))
        return Run(eager(model, options=options), model)

    def _copy(self, *, own: bool) -> nn.Module:
        model = copy.deepcopy(self._model)
        model.zero_grad(set_to_none=True)
        if not own:
            detach(model)
        return model


class _Program:
    """An exported program, rewritten by `mhc_compile.rewrite`, with the interface of `_Module`."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.name = "ExportedProgram"
        run = self.plain()
        self.dtype = _narrowest(run.module.parameters())
        self.attached = bool(run.connections())

    def planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:  # noqa: ARG002
        return None  # there is no dry run

    def plain(self, dtype: torch.dtype | None = None) -> Run:
        module = _to(copy.deepcopy(self._program.module()), dtype)
        return Run(module, module, graphs=1)

    def rewritten(self, options: ResolvedOptions, *, own: bool = False) -> Run:  # noqa: ARG002
        module = copy.deepcopy(rewrite(self._program, options=options).module())
        return Run(_by_inner(module, options), module, graphs=1)

    def other(self, run: Run, options: ResolvedOptions, dtype: torch.dtype | None = None) -> Run:
        module = _to(copy.deepcopy(run.module), dtype)
        is_eager = options.inner_backend == "eager"
        call = _by_inner(module, replace(options, inner_backend="aot_eager")) if is_eager else module
        return Run(call, module, graphs=1)


Runner = _Module | _Program


def runner_of(model: nn.Module | ExportedProgram, options: ResolvedOptions) -> Runner:
    """Return the runner of a module or of a program."""
    return _Program(model) if isinstance(model, ExportedProgram) else _Module(model, options)


def _narrowest(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    kinds = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.get_default_dtype())


def _to(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _compiled(model: nn.Module, options: ResolvedOptions) -> Run:
    run = Run(model, model)

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = mhc(graph_module, inputs, options=options)
        run.graphs += 1  # not reached when the trace restarts with new parameters
        return compiled

    run.call = _torch.isolated_compile(model, backend)
    return run


def _by_inner(module: nn.Module, options: ResolvedOptions) -> Callable[..., Any]:
    if options.inner_backend == "eager":
        return module
    settings: Any = dict(options.inductor) if options.inner_backend == "inductor" else None
    return torch.compile(module, backend=options.inner_backend, options=settings or None)
