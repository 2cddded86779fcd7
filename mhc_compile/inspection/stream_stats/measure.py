"""`mhc_compile.stability`: run a model once and measure its hyper-connections over depth."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, connections, find_connection, unwrap
from mhc_compile.backend import mhc
from mhc_compile.capture.tensor_tree import map_tensors
from mhc_compile.capture.trace import Probe
from mhc_compile.compilation.session import GraphSession
from mhc_compile.config.coefficient_spec import parse
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import AttachError, MhcError
from mhc_compile.inspection.random_state import kept_random_state
from mhc_compile.inspection.stream_stats.recorder import Gates, Recorder, Recording, address, has_sites
from mhc_compile.inspection.stream_stats.results import Stability
from mhc_compile.mappings import mapping_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mhc_compile.modules.hyper_connection import HyperConnection


def stability(
    model: nn.Module, *inputs: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any
) -> Stability:
    """Run a model with hyper-connections once, without gradients, and measure them over depth.

    For every site: its H_res, the products of H_res from the start and to the end of the chain with
    their gains, the distance of H_res from doubly stochastic, pre and post, and how far the streams
    differ (see `SiteStability`). All sums are in float64, whatever the model's dtype. Chains are
    followed across graph breaks. Streams are reduced as the model runs; H_res of every token and
    site is kept until the end.

    The model runs in its current mode. Mode, parameters, gradients, buffers, random state and
    compiled versions are preserved.

    Args:
        model: a model with hyper-connections, compiled or not, or a graph module that
            `mhc_compile.rewrite` made. An exported program has operations but no sites; measure the
            model that it was exported from.
        *inputs: as for `model(*inputs)`; or one batch of a loader: a tuple, a list or a mapping of
            inputs, from which entries that `forward` does not take (labels) are dropped.
        options: as the model was compiled with; by default those that fit its hyper-connections.
        **kwargs: inputs by name.

    Raises:
        AttachError: the model has no hyper-connections, or others than `options` say, or not at
            every site that the call runs.
        OptionError: the options are wrong.
    """
    with contextlib.closing(Meter(model, options=options)) as meter:
        return meter.measure(*inputs_of(meter.model, inputs, kwargs))


class Meter:
    """Measures one model repeatedly, traced at the first call only; `close` drops the traces.

    See `stability` for the arguments and errors.
    """

    def __init__(self, model: nn.Module, *, options: Mapping[str, Any] | Options | None = None) -> None:
        self.model = unwrap(model)
        if not connections(self.model):
            raise AttachError(
                f"{type(self.model).__name__} has no hyper-connections to measure. Call the compiled model once, or"
                " mhc_compile.attach(model, ...)"
            )
        self._recording = Recording({}, {})
        self._options = replace(
            _settings(self.model) if options is None else Options.parse(options), inner_backend=self._record
        )
        self._probe = Probe(self.model, self._record if has_sites(self.model) else self._rewrite)

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stability:
        """Measure one call, `model(*args, **kwargs)`; see `stability`."""
        found = connections(self.model)
        paths = {address(getattr(connection, connection.names[1])): path for path, connection in found.items()}
        starts = {path: gates for path, one in found.items() if (gates := initial_gates(one)) is not None}
        self._recording = recording = Recording(paths, starts)
        with undisturbed(self.model):
            self._probe(*args, **kwargs)
        self._recording = Recording({}, {})
        return Stability(
            model=type(self.model).__name__,
            mode="train" if self.model.training else "eval",
            dtype=recording.dtype,
            chains=tuple(chain.result() for chain in recording.chains),
            idle=tuple(path for path in paths.values() if path not in recording.seen),
        )

    def close(self) -> None:
        """Drop the traced graphs."""
        self._probe.close()

    def _rewrite(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = GraphSession.analyze(graph_module, inputs, self._options)
        for site in found.plan.sites:  # one without parameters would be attached to the model
            owner = found.provenance.module(site.owner)
            if owner is not None and find_connection(owner, site) is None:
                raise AttachError(
                    f"{site} of {type(self.model).__name__} has no hyper-connection yet: with these inputs, in this"
                    " mode, it runs residual adds that it did not run before. Call the compiled model so once, or"
                    " mhc_compile.attach(model, ...), and measure then"
                )
        return mhc(graph_module, inputs, options=self._options)

    def _record(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG002
        return Recorder(graph_module, lambda: self._recording).run


def initial_gates(connection: HyperConnection) -> Gates | None:
    """Return the gates of the function-preserving start, float64; None for another start."""
    if connection.init != "preserve":
        return None
    n, convention = connection.streams, parse(connection.spec)
    bias = convention.gate_speed * connection.start()["bias"].double()
    return Gates(
        bias[:n].sigmoid() + convention.pre_eps,
        bias[n : 2 * n].sigmoid() * convention.post_range + convention.post_eps,
        mapping_of(connection.spec).matrix(bias[2 * n :], n, connection.iterations),
    )


def _settings(model: nn.Module) -> ResolvedOptions:
    """Return the options that fit the hyper-connections of `model`."""

    def own(connection: Any) -> dict[str, Any]:
        return {name: getattr(connection, name) for name in ("mapping", "token_dependent", "gate_speed", "scale_speed")}

    found = connections(model)
    first = next(iter(found.values()))
    overrides = {
        escape(".".join(part for part in path.split(".") if part != CONTAINER)): own(one)
        for path, one in found.items()
        if own(one) != own(first)
    }
    same = {name: getattr(first, name) for name in ("preset", "streams", "single_pass", "rank", "init")}
    return Options(**same, **own(first), read_out=first.end, overrides=overrides).resolved


@torch.no_grad()
def fill_residual_logits(model: nn.Module, std: float) -> int:
    """Make the static residual logits of every hyper-connection N(0, std) noise, in place.

    What a mapping makes of random logits shows what it guarantees. With phi = 0, as initially, each
    site's H_res is the same for all tokens. Return the number of logits: 0 for the mapping
    "identity", which has none.
    """
    count = 0
    for connection in connections(model).values():
        if "bias" in connection.names:
            logits = connection.bias[2 * connection.streams :]
            logits.copy_(torch.randn(logits.shape) * std / connection.gate_speed)
            count += logits.numel()
    return count


def inputs_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named inputs of `model`.

    A single tuple or list is a batch of a loader and gives the first inputs; a single mapping whose
    keys are names of inputs gives inputs by name. Entries that `forward` does not take, such as
    labels, are dropped. Other inputs are returned unchanged.
    """
    if len(args) != 1 or kwargs:
        return args, kwargs
    (batch,) = args
    parameters = signature(model.forward).parameters.values()
    kinds = [one.kind for one in parameters]
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        named = {one.name for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}}
        given = {key: value for key, value in batch.items() if Parameter.VAR_KEYWORD in kinds or key in named}
        return ((), given) if given else (args, kwargs)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        places = sum(kind in {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds)
        return tuple(batch if Parameter.VAR_POSITIONAL in kinds else batch[:places]), {}
    return args, kwargs


def on_device(value: Any, device: torch.device) -> Any:
    """Return nested containers with their tensors on `device`."""
    if isinstance(value, Mapping):
        return {key: on_device(entry, device) for key, entry in value.items()}
    return map_tensors(value, lambda tensor: tensor.to(device))


def first_batch(loader: Any, size: int) -> Any:
    """Return the first examples of a loader's data set as a batch, without advancing the loader.

    Iterating would start workers, draw random numbers, and begin an epoch in accelerate. `loader`
    is a `torch.utils.data.DataLoader`, or a wrapper of one. A data set without a length or items,
    or a loader without a `collate_fn`, is an MhcError.
    """
    data: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if collate is None or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise MhcError(
            f"StabilityCallback cannot take a batch from {type(loader).__name__} over {type(data).__name__} without"
            " advancing it. Pass one: StabilityCallback(batch=...)"
        )
    return collate([data[index] for index in range(min(size, len(data)))])


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and the random state of torch, Python and NumPy after the context.

    Gradients are disabled, so that parameters and their gradients do not change. Buffers that did
    not change are not written.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, value, value.detach().clone() if value is not None else None)
        for module in model.modules()
        for name, value in _torch.buffers_of(module).items()
    ]
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({value.device.index for value in tensors if value.device.type == "cuda"})
    with kept_random_state(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, value, before in buffers:
                _torch.set_buffer(module, name, value)
                if value is not None and before is not None and not _same(value, before):
                    value.copy_(before)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
