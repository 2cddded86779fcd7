"""Fuse a rewritten graph, call the inner compiler, connect streams with other graphs."""

from __future__ import annotations

import functools
import hashlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint, noop_context_fn

from mhc_compile import _torch, ops
from mhc_compile.attachment.ledger import GraphLedger
from mhc_compile.graph_breaks.input_guards import guard_tails
from mhc_compile.graph_breaks.runtime import Origin, StreamBoundary
from mhc_compile.passes import Pass, run_passes
from mhc_compile.passes.analysis.norms import kinds_in
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.graph_boundary import crossings
from mhc_compile.passes.transforms import cast_reads, lazy_streams
from mhc_compile.passes.transforms.cast_reads import CastReads
from mhc_compile.passes.transforms.fold_scales import FoldScales
from mhc_compile.passes.transforms.fuse_norms import FuseNorms
from mhc_compile.passes.transforms.fuse_sites import FuseSites
from mhc_compile.passes.transforms.lazy_streams import LazyStreams
from mhc_compile.passes.transforms.recompute import RecomputeSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.compilation.session import GraphSession
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.graph_breaks.runtime import Tail

#: Passes between the rewrite and the inner compiler, by the option `recompute`.
_FUSION: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "cheap": (FoldScales(), FuseSites(), FuseNorms()),
    "block": (FoldScales(), FuseSites(), FuseNorms(), RecomputeSteps()),
}
#: Passes over AOTAutograd's graphs of forward and backward together.
_JOINT: dict[str, tuple[Pass, ...]] = {"none": (), "cheap": (LazyStreams(), CastReads()), "block": (CastReads(),)}


@functools.cache
def _joint_passes() -> str:
    """Return a hash of their code, which Inductor's caches do not know."""
    code = (Path(str(module.__file__)).read_bytes() for module in (lazy_streams, cast_reads))
    return hashlib.sha256(b"".join(code)).hexdigest()[:16]


def compile_graph(
    session: GraphSession, graph: fx.Graph, inputs: list[Any], mode: str | None, tails: Mapping[str, Tail]
) -> Callable[..., Any]:
    """Compile `graph`, the result of `session.rewrite`, and connect it with other graphs.

    The callable has the inputs and results of Dynamo's graph. `graph` also takes arriving streams
    and returns departing ones.
    """
    options, frame = session.options, session.provenance.frame
    arrivals, departures = crossings(graph)
    annotations = session.annotations()
    module = module_like(session.captured, graph)
    placeholders = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    positions = {target: position for position, target in enumerate(placeholders)}
    backend = options.inner_backend
    place = frame.location, backend if isinstance(backend, str) else getattr(backend, "__name__", "callable")
    uses, openings = session.uses()
    ledger = GraphLedger(place, [(positions[use.phi], use.connection) for use in (*uses, *openings)], range(len(uses)))
    if not arrivals and not departures and not annotations:
        compiled = _compile(module, inputs, options, mode, () if session.is_plain else fusion_passes(options))
        return CountedGraph(compiled, ledger) if uses else compiled
    for arrival in arrivals:
        _torch.name_input(placeholders[arrival.target])
    streams = [tensor_value(placeholders[arrival.target]) for arrival in arrivals]
    guard_tails(session.captured, inputs, arrivals)
    root = session.provenance.root
    return StreamBoundary(
        _compile(module, [*inputs, *streams], options, mode, fusion_passes(options)),
        arrivals,
        departures,
        positions=positions,
        notes=annotations,
        origin=Origin(
            type(root).__name__ if root is not None else "function",
            weakref.ref(root) if root is not None else lambda: None,
            frame.location,
            weakref.ref(frame.code),
        ),
        ledger=ledger,
        entries={use.path: number for number, use in enumerate((*uses, *openings))},
        tails=tails,
        strict=options.strict,
    )


class CountedGraph:
    """A compiled graph without streams from or for other graphs, whose calls are counted."""

    def __init__(self, compiled: Callable[..., Any], ledger: GraphLedger) -> None:
        self.compiled, self.ledger = compiled, ledger

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on Dynamo's inputs. Return Dynamo's results."""
        results = self.compiled(*inputs)
        self.ledger.count(inputs)
        return results


def prepare_kernels(session: GraphSession) -> None:
    """Start building the kernels of the sites in the background."""
    if not fusion_passes(session.options):
        return
    kinds = {}
    for planned in session.sites:
        site, spec = planned.site, planned.options.spec
        streams, branch = tensor_value(site.add), tensor_value(site.branch_outputs[0])
        if streams is not None and branch is not None:
            width, single_pass = int(streams.shape[site.axis]), planned.options.single_pass
            kinds[streams.device, streams.dtype, branch.dtype, width, spec, single_pass] = streams, branch
    for (*_, width, spec, single_pass), (streams, branch) in kinds.items():
        lazy = session.options.recompute == "cheap" and streams.requires_grad and not single_pass
        n, norms = session.options.streams, kinds_in(session.captured.graph) or ("",)
        ops.prepare(streams, branch, n, width, spec, single_pass=single_pass, lazy=lazy, norms=norms)


def fusion_passes(options: ResolvedOptions) -> tuple[Pass, ...]:
    """Return the passes between the rewrite and the inner compiler."""
    inner = options.inner_backend
    return () if callable(inner) or inner == "eager" else _FUSION[options.recompute]


def module_like(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a copy of `graph_module` with another graph and Dynamo's attributes."""
    root = graph.owning_module or graph_module  # where the bodies of regions are
    new = fx.GraphModule(root, graph, type(graph_module).__name__)
    new.meta.update(graph_module.meta)
    for name, value in graph_module.__dict__.items():
        new.__dict__.setdefault(name, value)
    return new


def fuse(graph_module: fx.GraphModule, passes: tuple[Pass, ...]) -> fx.GraphModule:
    """Run fusion passes on a graph, and the first three on its regions, recomputed as a whole."""
    fused = module_like(graph_module, run_passes(graph_module.graph, passes))
    for name, body in graph_module.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(fused, name, fuse(body, passes[:3]))
    return fused


def _compile(
    graph_module: fx.GraphModule,
    inputs: list[Any],
    options: ResolvedOptions,
    mode: str | None,
    passes: tuple[Pass, ...],
) -> Callable[..., Any]:
    def compiler(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        inner = options.inner_backend
        if callable(inner):
            return inner(graph_module, inputs)  # type: ignore[no-any-return]
        if inner == "eager":
            return run_eagerly(graph_module)
        graph_module = fuse(graph_module, passes) if passes else graph_module
        joint = _JOINT[options.recompute] if passes else ()  # none for a graph that is left plain
        with _torch.rewrite_joint_graphs(functools.partial(run_passes, passes=joint)):
            if inner == "inductor":
                tag = f"mhc-{ops.fingerprint()}-{options.recompute}-{_joint_passes()}"
                tables, settings = (ops.fused_decompositions(), ops.externs()), dict(options.inductor)
                return _torch.compile_with_inductor(graph_module, inputs, *tables, mode, settings, tag)
            return _torch.inner_backend(inner)(graph_module, inputs)  # type: ignore[no-any-return]

    return _torch.split_as_ddp_would(graph_module, inputs, compiler)


def run_eagerly(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Make checkpointed regions keep the state of the random number generator, in place.

    Torch's backend "eager" leaves that to AOTAutograd's partitioner, so dropout in a region would
    draw another mask in the backward.
    """
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(
                op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
            ):
                node.target = _checkpoint
            module.recompile()
    return graph_module


def _checkpoint(body: fx.GraphModule, *args: Any, use_reentrant: bool = False, **settings: Any) -> Any:  # noqa: ARG001
    context = _torch.checkpoint_context(body) or noop_context_fn
    return checkpoint(body, *args, use_reentrant=False, context_fn=context, **settings)
