"""`mhc_compile.stability`: one call of a model, and what its hyper-connections did in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from mhc_compile.attachment import connections, unwrap
from mhc_compile.backend import mhc
from mhc_compile.capture import Probe
from mhc_compile.diagnostics.batches import inputs_of
from mhc_compile.diagnostics.recording import Recording, address, recorder
from mhc_compile.diagnostics.result import Stability
from mhc_compile.diagnostics.undisturbed import undisturbed
from mhc_compile.errors import AttachError
from mhc_compile.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Meter", "stability"]


def stability(
    model: nn.Module,
    *inputs: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Stability:
    """Runs a model with hyper-connections once, in eager and without gradients, and measures what they do over depth.

    For every site: its H_res, the products of H_res from the start and to the end of the chain with their gains, how far H_res is from doubly
    stochastic, pre and post, and how far the streams differ (see `SiteStability`). All sums are in float64, whatever the model's dtype. Chains
    are followed over graph breaks. Streams are reduced as the model runs; of each site, H_res of every token is kept until the end.

    The model runs in the mode that it is in. Mode, parameters, gradients, buffers, random numbers and compiled versions stay as they are.

    Args:
        model: a model with hyper-connections, compiled or not, or a graph module that `mhc_compile.rewrite` made. (An exported program has no
            sites any more, only operations: measure the model that it was exported from.)
        *inputs: as for `model(*inputs)`; or one batch as loaders give it: a tuple, a list or a mapping of inputs, in which entries that `forward`
            does not take (labels) are left out.
        options: as the model was compiled with; without them, streams and mapping are those of its hyper-connections.
        **kwargs: inputs by name.

    Raises:
        AttachError: the model has no hyper-connections, or others than `options` say.
        OptionError: the options are wrong.
    """
    meter = Meter(model, options=options)
    try:
        return meter.measure(*inputs_of(meter.model, inputs, kwargs))
    finally:
        meter.close()


class Meter:
    """Measures one model again and again; it is traced at the first call only. `close` lets go of what was traced.

    Args:
        model: see `stability`.
        options: see `stability`.

    Raises:
        AttachError: the model has no hyper-connections.
        OptionError: the options are wrong.
    """

    def __init__(self, model: nn.Module, *, options: Mapping[str, Any] | Options | None = None) -> None:
        self.model = unwrap(model)
        if not connections(self.model):
            raise AttachError(
                f"{type(self.model).__name__} has no hyper-connections to measure. Call the compiled model once, or mhc_compile.attach(model, ...)"
            )
        self._recording = Recording({})
        self._options = replace(self._settings(options), inner=self._record)
        self._probe = Probe(self.model, self._record if _has_sites(self.model) else self._rewrite)

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stability:
        """One call, `model(*args, **kwargs)`; see `stability`."""
        paths = {address(connection.phi): path for path, connection in connections(self.model).items()}
        self._recording = recording = Recording(paths)
        with undisturbed(self.model):
            self._probe(*args, **kwargs)
        self._recording = Recording({})
        return Stability(
            model=type(self.model).__name__,
            mode="train" if self.model.training else "eval",
            dtype=recording.dtype,
            chains=tuple(chain.result() for chain in recording.chains),
            idle=tuple(path for path in paths.values() if path not in recording.seen),
        )

    def close(self) -> None:
        """Drops the traced graphs."""
        self._probe.close()

    def _settings(self, options: Mapping[str, Any] | Options | None) -> Options:
        if options is not None:
            return Options.parse(options)
        some = next(iter(connections(self.model).values()), None)
        return Options() if some is None else Options(streams=some.streams, mapping=some.mapping)

    def _rewrite(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return mhc(graph_module, inputs, options=self._options)

    def _record(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG002 - a compiler's signature
        return recorder(graph_module, lambda: self._recording)


def _has_sites(model: nn.Module) -> bool:
    """Whether `model` is a graph that was rewritten already."""
    graph = getattr(model, "graph", None)
    return isinstance(graph, fx.Graph) and any(
        node.target is torch.ops.mhc.coefficients.default for node in graph.nodes
    )
