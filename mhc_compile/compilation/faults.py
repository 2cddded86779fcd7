"""Exceptions that keep residual adds from being rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mhc_compile import _torch
from mhc_compile.errors import MhcError
from mhc_compile.passes import Plan, Reason, Rejection
from mhc_compile.passes.analysis.sum_terms import is_candidate

if TYPE_CHECKING:
    from torch.fx import Graph

    from mhc_compile.capture.provenance import DynamoProvenance


@dataclass(frozen=True, eq=False)
class Fault:
    """An exception, and the paths of the sites that stay plain for it; none for a whole graph."""

    error: Exception
    sites: tuple[str, ...] = ()


def is_fault(error: BaseException | None) -> bool:
    """Return False for errors raised on purpose, warnings as errors, and a lack of memory."""
    while error is not None:
        if isinstance(error, (MhcError, Warning, MemoryError, torch.OutOfMemoryError, *_torch.CONTROL_FLOW)):
            return False
        error = getattr(error, "inner_exception", None)
    return True


def describe(error: Exception) -> str:
    """Return class and first line of an exception."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line}"


def failed_plan(graph: Graph, provenance: DynamoProvenance, error: Exception) -> Plan:
    """Return a plan in which every addition of a graph is rejected because of `error`."""
    paths = {node: stack[-1].path if (stack := provenance.stack(node)) else "" for node in graph.nodes}
    additions = (node for node in graph.nodes if is_candidate(node))
    return Plan((), tuple(Rejection(node, Reason.FAILED, partial(describe, error), paths[node]) for node in additions))
