"""What is checked, a module or an exported program, as sides: something to call, and the module whose parameters and buffers it uses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, connections, unwrap
from mhc_compile.attachment.sites import detach
from mhc_compile.backend import mhc
from mhc_compile.eager_mode import eager
from mhc_compile.export.rewrite import rewrite
from mhc_compile.inspection.explain.explain import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mhc_compile.config.options import ResolvedOptions

__all__ = ["Side", "Subject", "subject_of"]

_PARTS = ("phi", "bias", "scale")


@dataclass
class Side:
    """One form of the model, a copy of its own.

    Attributes:
        call: what is called.
        module: whose parameters, gradients and buffers are looked at.
        graphs: graphs that were compiled for it so far.
    """

    call: Callable[..., Any]
    module: nn.Module
    graphs: int = 0

    def read_outs(self) -> list[tuple[nn.Parameter, ...]]:
        """weight, bias and scale of each learned read-out."""
        found = dict(self.module.named_parameters())
        ends = [name.removesuffix("weight") for name in found if name.endswith(".read_out.weight")]
        return [
            tuple(found[end + part] for part in ("weight", "bias", "scale"))
            for end in ends
            if CONTAINER in end.split(".")
        ]

    def connections(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """phi, bias and scale of each hyper-connection, by its path."""
        found = dict(self.module.named_parameters())
        paths = [name.removesuffix(".phi") for name in found if name.endswith(".phi") and CONTAINER in name.split(".")]
        return {
            path: tuple(found[f"{path}.{part}"] for part in _PARTS)
            for path in paths
            if all(f"{path}.{part}" in found for part in _PARTS)
        }


class Subject(Protocol):
    """What is checked.

    Attributes:
        name: class of the model.
        dtype: that bounds how exact it can be: the narrowest of its floating-point parameters.
        attached: it has hyper-connections already.
    """

    name: str
    dtype: torch.dtype
    attached: bool

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """How many sites a dry run finds, and how many graphs; None where there is no dry run."""

    def plain(self, dtype: torch.dtype | None = None) -> Side:
        """Without hyper-connections; in another dtype if asked."""

    def rewritten(self, options: ResolvedOptions, *, own: bool = False) -> Side:
        """On streams, compiled as `options` say; with `own` its hyper-connections are the ones that it has, otherwise fresh ones."""

    def other(self, side: Side, options: ResolvedOptions, dtype: torch.dtype | None = None) -> Side:
        """A rewritten side with the same parameters, run by another compiler than that of `options`."""


class _Module:
    """A module, as `torch.compile(model, backend="mhc")` takes it."""

    def __init__(self, model: nn.Module, options: ResolvedOptions) -> None:
        self._model, self._options = unwrap(model), options
        self.name = type(self._model).__name__
        self.dtype = _narrowest(self._model.parameters())
        self.attached = bool(connections(self._model))

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        explanation = explain(self._copy(own=True), *args, options=self._options, **kwargs)
        return len(explanation.sites), len(explanation.graphs)

    def plain(self, dtype: torch.dtype | None = None) -> Side:
        model = _to(self._copy(own=False), dtype)
        return Side(model, model)

    def rewritten(self, options: ResolvedOptions, *, own: bool = False) -> Side:
        return _compiled(self._copy(own=own), options)

    def other(self, side: Side, options: ResolvedOptions, dtype: torch.dtype | None = None) -> Side:
        model = _to(copy.deepcopy(side.module), dtype)
        if options.inner_backend == "eager" and dtype is None:
            return _compiled(model, replace(options, inner_backend="aot_eager"))
        return Side(eager(model, options=options), model)

    def _copy(self, *, own: bool) -> nn.Module:
        model = copy.deepcopy(self._model)
        model.zero_grad(set_to_none=True)
        if not own:
            detach(model)
        return model


class _Program:
    """An exported program, as `mhc_compile.rewrite` takes it: its module is called, and that of the rewritten one is compiled."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.name = "ExportedProgram"
        side = self.plain()
        self.dtype = _narrowest(side.module.parameters())
        self.attached = bool(side.connections())

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:  # noqa: ARG002
        return None

    def plain(self, dtype: torch.dtype | None = None) -> Side:
        module = _to(copy.deepcopy(self._program.module()), dtype)
        return Side(module, module, graphs=1)

    def rewritten(self, options: ResolvedOptions, *, own: bool = False) -> Side:  # noqa: ARG002
        module = copy.deepcopy(rewrite(self._program, options=options).module())
        return Side(_by_inner(module, options), module, graphs=1)

    def other(self, side: Side, options: ResolvedOptions, dtype: torch.dtype | None = None) -> Side:
        module = _to(copy.deepcopy(side.module), dtype)
        call = (
            _by_inner(module, replace(options, inner_backend="aot_eager"))
            if options.inner_backend == "eager"
            else module
        )
        return Side(call, module, graphs=1)


def subject_of(model: nn.Module | ExportedProgram, options: ResolvedOptions) -> Subject:
    """The one or the other."""
    return _Program(model) if isinstance(model, ExportedProgram) else _Module(model, options)


def _narrowest(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    kinds = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.get_default_dtype())


def _to(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _compiled(model: nn.Module, options: ResolvedOptions) -> Side:
    side = Side(model, model)

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = mhc(graph_module, inputs, options=options)
        side.graphs += 1  # not reached when the graph is about to be traced again, with its new parameters
        return compiled

    side.call = _torch.isolated_compile(model, backend)
    return side


def _by_inner(module: nn.Module, options: ResolvedOptions) -> Callable[..., Any]:
    if options.inner_backend == "eager":
        return module
    settings: Any = dict(options.inductor) if options.inner_backend == "inductor" else None
    return torch.compile(module, backend=options.inner_backend, options=settings or None)
