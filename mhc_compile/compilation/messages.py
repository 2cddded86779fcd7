"""Warnings about graphs that are rewritten in part or not at all; errors with `strict`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mhc_compile.errors import MhcError, NothingRewrittenError, RewriteError, StreamsLostError, warn
from mhc_compile.passes.analysis.op_info import is_fused_layer, is_region, op_name
from mhc_compile.passes.analysis.provenance import source_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.fx import Graph

    from mhc_compile.capture.provenance import DynamoProvenance
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Rejection


def _warn_or_raise(message: str, error: type[MhcError], options: ResolvedOptions) -> None:
    if options.strict:
        raise error(message)
    warn(message)


def _by_reason(rejections: Iterable[Rejection]) -> tuple[int, str]:
    reasons = Counter(rejection.reason.value for rejection in rejections)
    return sum(reasons.values()), ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())


def warn_nothing_rewritten(
    rejections: Iterable[Rejection], options: ResolvedOptions, graphs: Iterable[Graph] = ()
) -> None:
    """Warn that nothing was rewritten in `graphs`; if `strict`, raise NothingRewrittenError."""
    count, listed = _by_reason(rejections)
    found = f"{count} floating-point additions, all rejected ({listed})"
    _warn_or_raise(
        f"nothing was rewritten: what Dynamo traced has {found if count else 'no addition of floating-point tensors'}."
        f" It runs as the plain model.{_hint(graphs)}"
        " `mhc explain` or mhc_compile.explain(model, ...) shows each addition with its reason",
        NothingRewrittenError,
        options,
    )


def _hint(graphs: Iterable[Graph]) -> str:
    graphs = list(graphs)
    regions = sorted({op_name(node) for graph in graphs for node in graph.nodes if is_region(node)})
    if regions:
        return f" It has regions that are not analyzed ({', '.join(regions)}): residual adds inside them stay plain."
    if any(is_fused_layer(node) for graph in graphs for node in graph.nodes):
        return (
            " It runs torch's fused encoder layer, as nn.TransformerEncoder does in eval mode without gradients: call"
            " it once in training mode, or mhc_compile.attach(model, ...), and it will take the path that can be"
            " rewritten."
        )
    return ""


def warn_unused(unused: list[str], rejections: Iterable[Rejection], options: ResolvedOptions) -> None:
    """Warn of hyper-connections without a site; if `strict`, raise NothingRewrittenError."""
    count, listed = _by_reason(rejections)
    others = f"rejected additions: {listed}" if count else "there is no other addition of floating-point tensors"
    listed_paths = f"{unused[0]}, ..." if len(unused) > 1 else unused[0]
    _warn_or_raise(
        f"{len(unused)} hyper-connections have no part in a graph in which their modules run ({listed_paths}):"
        f" their residual adds run as plain adds ({others}). mhc_compile.explain(model, ...) shows each addition with"
        " its reason",
        NothingRewrittenError,
        options,
    )


def warn_failed(
    faults: Sequence[tuple[tuple[str, ...], str]],
    where: str,
    idle: list[str],
    options: ResolvedOptions,
    cause: Exception,
) -> None:
    """Warn of chains, each with its exception, that stay plain; if `strict`, raise RewriteError.

    A fault without sites is that of the whole graph. `idle` are hyper-connections without a site.
    """
    listed = "; ".join(f"{_chain(sites)}: {error}" for sites, error in faults)
    unused = (
        f" {len(idle)} of them have hyper-connections ({', '.join(idle[:1])}, ...), whose parameters are not used"
        " there: the model computes another function than with them."
    ) * bool(idle)
    message = (
        f"the rewrite of the graph at {where} failed, and residual adds stay plain there ({listed}).{unused} The log"
        " has the traceback (logger mhc_compile); please report it. strict=True makes this an error,"
        " mhc_compile.explain(model, ...) shows each addition"
    )
    if options.strict:
        raise RewriteError(message) from cause
    warn(message, repeat=True)


def _chain(sites: tuple[str, ...]) -> str:
    if not sites:
        return "the whole graph"
    return f"the chain of {sites[0]}" if len(sites) == 1 else f"the chain {sites[0]} to {sites[-1]}"


def warn_split_branch(rejection: Rejection, provenance: DynamoProvenance, options: ResolvedOptions) -> None:
    """Warn that a split branch ends a chain; if `strict`, raise StreamsLostError."""
    owner = rejection.module_path or (type(provenance.root).__name__ if provenance.root is not None else "a function")
    _warn_or_raise(
        f"a residual add of {owner} ({source_line(rejection.add)}) stays as it is, and the streams of its trunk end"
        f" there: {rejection.message}."
        " Let a module that is compiled be the first to read the trunk in the branch (a norm, a projection)",
        StreamsLostError,
        options,
    )
