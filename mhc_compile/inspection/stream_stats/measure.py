"""`mhc_compile.stability`: one call of a model, and what its hyper-connections did in it."""

from __future__ import annotations

from dataclasses import replace
from glob import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from mhc_compile.attachment.model_tree import CONTAINER, connections, find_connection, unwrap
from mhc_compile.backend import mhc
from mhc_compile.capture.trace import Probe
from mhc_compile.compilation.session import GraphSession, analyze_graph
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import AttachError
from mhc_compile.inspection.stream_stats.batches import inputs_of
from mhc_compile.inspection.stream_stats.recording import Recording, address, recorder
from mhc_compile.inspection.stream_stats.result import Stability
from mhc_compile.inspection.stream_stats.undisturbed import undisturbed

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
        options: as the model was compiled with; without them, those that fit its hyper-connections.
        **kwargs: inputs by name.

    Raises:
        AttachError: the model has no hyper-connections, or others than `options` say, or not at every site that the call runs.
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
        self._options = replace(
            _settings(self.model) if options is None else Options.parse(options), inner_backend=self._record
        )
        self._probe = Probe(self.model, self._record if _has_sites(self.model) else self._rewrite)

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stability:
        """One call, `model(*args, **kwargs)`; see `stability`."""
        paths = {
            address(getattr(connection, connection.names[1])): path
            for path, connection in connections(self.model).items()
        }
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

    def _rewrite(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self._reject_to_attach(analyze_graph(graph_module, inputs, self._options))
        return mhc(graph_module, inputs, options=self._options)

    def _reject_to_attach(self, found: GraphSession) -> None:
        """The backend would give a new site its parameters, and the optimizers too; a measurement leaves the model as it is."""
        for site in found.plan.sites:
            owner = found.provenance.module(site.owner)
            if owner is not None and find_connection(owner, site) is None:
                raise AttachError(
                    f"{site} of {type(self.model).__name__} has no hyper-connection yet: with these inputs, in this mode, it runs residual adds"
                    " that it did not run before. Call the compiled model so once, or mhc_compile.attach(model, ...), and measure then"
                )

    def _record(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG002 - a compiler's signature
        return recorder(graph_module, lambda: self._recording)


def _settings(model: nn.Module) -> ResolvedOptions:
    """The options that fit the hyper-connections of `model`."""
    found = connections(model)
    first = next(iter(found.values()))
    own = {
        escape(".".join(part for part in path.split(".") if part != CONTAINER)): {
            "mapping": one.mapping,
            "token_dependent": one.token_dependent,
        }
        for path, one in found.items()
        if (one.mapping, one.token_dependent) != (first.mapping, first.token_dependent)
    }
    return Options(
        preset=first.preset,
        streams=first.streams,
        mapping=first.mapping,
        token_dependent=first.token_dependent,
        read_out=first.end,
        single_pass=first.single_pass,
        rank=first.rank,
        init=first.init,
        overrides=own,
    ).resolved


def _has_sites(model: nn.Module) -> bool:
    """Whether `model` is a graph that was rewritten already."""
    graph = getattr(model, "graph", None)
    begins = (torch.ops.mhc.coefficients.default, torch.ops.mhc.gated_read.default)
    return isinstance(graph, fx.Graph) and any(node.target in begins for node in graph.nodes)
