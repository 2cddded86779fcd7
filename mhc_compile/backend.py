"""`torch.compile(model, backend="mhc")`: the entry point that PyTorch finds by name."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

from torch import fx

from mhc_compile import _torch, ops
from mhc_compile._observe import observers
from mhc_compile.attachment.sites import connections
from mhc_compile.compilation.eager_graphs import run_eagerly
from mhc_compile.compilation.session import Study, complain, report_broken, report_idle, study
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.distributed.guards import warn_of_pipeline
from mhc_compile.errors import MhcError
from mhc_compile.graph_breaks.runtime import StreamBoundary
from mhc_compile.passes import Pass, Reason, close_regions, expand_plan, run_passes
from mhc_compile.passes.analysis.op_info import is_contraction, tensor_value
from mhc_compile.passes.planning.graph_boundary import crossings
from mhc_compile.passes.transforms.fuse_sites import FuseSites
from mhc_compile.passes.transforms.recompute import RecomputeSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import CodeType

__all__ = ["joined", "joining", "mhc", "with_graph"]

log = logging.getLogger(__name__)

#: What runs on the rewritten graph before the inner compiler, by the option `recompute`.
_FUSION: dict[str, tuple[Pass, ...]] = {"none": (), "cheap": (FuseSites(),), "block": (FuseSites(), RecomputeSteps())}

#: Code with a compiled version that has no hyper-connections, because there was nothing to rewrite when it was traced.
_plain: weakref.WeakSet[CodeType] = weakref.WeakSet()


def mhc(
    graph_module: fx.GraphModule,
    inputs: list[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. Users name it: `torch.compile(model, backend="mhc", options={...}, mode=...)`.

    The first graph of a model has no hyper-connections: they are attached to its modules, and Dynamo traces the frame again. From then on their
    parameters are inputs of the graph, the residual adds become operations on streams, and the result goes to the inner compiler.

    Args:
        graph_module: the graph that Dynamo captured.
        inputs: its example inputs.
        options: see `mhc_compile.Options`.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).

    Returns:
        The compiled graph.

    Raises:
        OptionError, AttachError, NothingRewrittenError: as themselves, through Dynamo.
    """
    try:
        return _compile(graph_module, inputs, Options.parse(options), mode)
    except MhcError as error:
        _torch.raise_through_dynamo(error)
        raise


def _compile(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None
) -> Callable[..., Any]:
    if not _torch.in_trace():
        raise MhcError(
            "the mhc backend was called outside torch.compile; for a graph module of your own use mhc_compile.rewrite(graph_module, ...)"
        )
    result = study(graph_module, inputs, options)
    _prepare_kernels(result, options)
    if result.attach(options):
        log.info("attached hyper-connections to %d sites; tracing again", len(result.plan.sites))
        for code in _plain:
            _torch.forget_compiled(code, all_entries=False)
        _plain.clear()
        # A model that got its hyper-connections just now fits no compiled version of its class, and needs one of its own. (Once it has them, it
        # shares those of other models like it.) Otherwise the ninth model of a process would meet Dynamo's limit and run without streams.
        _torch.make_room()
        _torch.restart_trace()
    bindings = result.bind()
    openings = result.openings()
    for chain in result.plan.chains:
        log.info(
            "chain of %d sites, width %d: %s",
            len(chain.sites),
            chain.width,
            ", ".join(site.path for site in chain.sites),
        )
    for rejection in result.plan.rejections:
        log.debug("rejected %s: %s", rejection.add, rejection)
        if rejection.reason is Reason.BROKEN_BRANCH:
            report_broken(rejection, result.provenance, options)
    idle = result.idle(graph_module.graph, [*bindings.values(), *(binding for _, binding in openings.values())])
    if (
        idle and not _torch.graph_is_part()
    ):  # of a branch in two halves, the graph that is traced first knows nothing yet
        report_idle(idle, result.plan.rejections, options)
    for observe in observers:
        observe(result)
    if not bindings and not openings:
        _plain.add(_torch.frame_code())
        if _should_have_sites(result):
            complain(result.plan.rejections, options, [result.graph])
        # Declarations of sites that other graphs of the model rewrite are not for the inner compiler's eyes.
        return _connected(graph_module, close_regions(result.graph), result, inputs, options, mode)
    warn_of_pipeline()
    graph = expand_plan(result.graph, result.plan, bindings, openings=openings)
    return _connected(graph_module, graph, result, inputs, options, mode)


def _connected(
    graph_module: fx.GraphModule,
    graph: fx.Graph,
    result: Study,
    inputs: list[Any],
    options: ResolvedOptions,
    mode: str | None,
) -> Callable[..., Any]:
    """The compiled graph, in connection with the other graphs of its model."""
    arrivals, departures = crossings(graph)
    notes = result.notes()
    if not arrivals and not departures and not notes:
        return _inner(with_graph(graph_module, graph), inputs, options, mode)
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    positions = {target: position for position, target in enumerate(placeholders)}
    for arrival in arrivals:
        _torch.name_input(placeholders[arrival.target])
    streams = [tensor_value(placeholders[arrival.target]) for arrival in arrivals]
    return StreamBoundary(
        _inner(with_graph(graph_module, graph), [*inputs, *streams], options, mode),
        arrivals,
        departures,
        positions=positions,
        notes=notes,
        root=result.provenance.root,
        where=_torch.frame_location(),
        strict=options.strict,
    )


def _prepare_kernels(result: Study, options: ResolvedOptions) -> None:
    if callable(options.inner_backend) or options.inner_backend == "eager" or options.recompute == "none":
        return
    kinds = {}
    for site in result.plan.sites:
        streams, branch, spec = tensor_value(site.add), tensor_value(site.branch_outputs[0]), options.at(site.path).spec
        if streams is not None and branch is not None:
            kinds[streams.device, streams.dtype, branch.dtype, spec] = streams, branch
    for (*_, spec), (streams, branch) in kinds.items():
        ops.prepare(streams, branch, options.streams, spec)


def _should_have_sites(result: Study) -> bool:
    """A loss function or an embedding that Dynamo compiles by itself has no residual adds, and nobody expects any.

    Of a model in pieces, the last piece answers for all, and for the modules that Dynamo compiles by themselves because of a graph break.
    """
    root = result.provenance.root
    if root is None or connections(root) or not any(is_contraction(node) for node in result.graph.nodes):
        return False
    return not _torch.ends_at_break() and not _torch.runs_inside_another(root)


def joining(options: ResolvedOptions) -> tuple[Pass, ...]:
    """The passes that run on the rewritten graph before the inner compiler gets it."""
    return () if callable(options.inner_backend) or options.inner_backend == "eager" else _FUSION[options.recompute]


def with_graph(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module like `graph_module` with another graph, and with whatever Dynamo hung on the old one."""
    root = graph.owning_module or graph_module  # where the bodies of regions are
    new = fx.GraphModule(root, graph, type(graph_module).__name__)
    new.meta.update(graph_module.meta)
    for name, value in graph_module.__dict__.items():
        new.__dict__.setdefault(name, value)
    return new


def joined(graph_module: fx.GraphModule, passes: tuple[Pass, ...]) -> fx.GraphModule:
    """With the operators of neighbouring sites joined, in the graph and in the bodies of its regions, which are computed again as a whole."""
    fused = with_graph(graph_module, run_passes(graph_module.graph, passes))
    for name, body in graph_module.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(fused, name, joined(body, passes[:1]))
    return fused


def _inner(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None
) -> Callable[..., Any]:
    def compiler(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return _inner_of_piece(graph_module, inputs, options, mode)

    return _torch.split_as_ddp_would(graph_module, inputs, compiler)


def _inner_of_piece(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None
) -> Callable[..., Any]:
    if callable(options.inner_backend):
        return options.inner_backend(graph_module, inputs)  # type: ignore[no-any-return]
    if options.inner_backend == "eager":
        return run_eagerly(graph_module)
    graph_module = joined(graph_module, joining(options))
    if options.inner_backend == "inductor":
        return _torch.compile_with_inductor(
            graph_module,
            inputs,
            ops.fused_decompositions(),
            mode,
            dict(options.inductor),
            f"mhc-{ops.fingerprint()}-{options.recompute}",
        )
    return _torch.inner_backend(options.inner_backend)(graph_module, inputs)  # type: ignore[no-any-return]


_torch.rewrite_before_ddp_splits(mhc)
