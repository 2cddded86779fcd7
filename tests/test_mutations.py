"""Faults of passes and operators, each with the test that must turn red.

A mutation is a small patch of the product. The named test runs in this process, in a pytest session
of its own: it passes without the mutation, and fails by an assertion with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mhc_compile import HyperConnection
from mhc_compile.mappings.sinkhorn import Sinkhorn
from mhc_compile.ops import reference
from mhc_compile.passes.analysis import dependence, sum_terms
from mhc_compile.passes.analysis.aliases import Aliases
from mhc_compile.passes.core.emit import trace_into
from mhc_compile.passes.lifting import compound_rules, direct_rules
from mhc_compile.passes.planning import chains, planner
from mhc_compile.passes.planning import match_residuals as finding
from mhc_compile.passes.planning.match_residuals import Findings
from mhc_compile.passes.transforms import expand_streams, functionalize, fuse_sites, lazy_streams
from mhc_compile.passes.transforms.expand_streams import RemoveDeclarations
from mhc_compile.passes.transforms.fuse_sites import FuseSites
from mhc_compile.passes.transforms.lazy_streams import LazyStreams
from mhc_compile.passes.transforms.normalize_adds import NormalizeAdds
from mhc_compile.passes.transforms.recompute import RecomputeSteps
from mhc_compile.passes.transforms.stream_builder import StreamBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = Path(__file__).parent
#: Mutations by name, each with its test: file name and name of the test.
MUTATIONS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}

LAST = "test_expand_streams.py::test_lifting_is_the_operation_on_each_stream"
FIRST = "test_expand_streams.py::test_lifting_of_channels_first_is_the_operation_on_each_stream"
STRUCTURE = "test_expand_streams.py::test_streams_of_every_structure_are_those_of_the_definition"
PRESERVED = "test_preserved.py::test_outputs_and_gradients_are_those_of_the_plain_model"


def caught_by(test: str):
    def add(mutate):
        MUTATIONS[mutate.__name__.replace("_", "-")] = test, mutate
        return mutate

    return add


# --- lifting
# --------------------------------------------------------------------------------------------------


def rotate(patch, rule, axis=-2):
    """Each stream gets the value of its neighbour."""
    emit = rule.emit

    def rotated(self, graph, step, lifted, before):
        new = emit(self, graph, step, lifted, before)
        with graph.inserting_before(before):
            return graph.call_method("roll", (new, 1, axis))

    patch.setattr(rule, "emit", rotated)


@caught_by(f"{LAST}[as written: relu]")
def rotate_after_an_operation_as_written(patch):
    rotate(patch, direct_rules.AsWritten)


@caught_by(f"{LAST}[permuted: transpose]")
def rotate_after_permute(patch):
    rotate(patch, direct_rules.Permuted)


@caught_by(f"{LAST}[reshaped: reshape]")
def rotate_after_reshape(patch):
    rotate(patch, direct_rules.Reshaped)


@caught_by(f"{LAST}[dropped]")
def rotate_after_dropout(patch):
    rotate(patch, compound_rules.Dropped)


@caught_by(f"{FIRST}[dropped: channels]")
def rotate_after_dropout_of_channels(patch):
    rotate(patch, compound_rules.Dropped)


@caught_by(f"{FIRST}[batch norm: training]")
def rotate_after_batch_norm(patch):
    rotate(patch, compound_rules.BatchNorm)


@caught_by(f"{FIRST}[vmapped: pool]")
def rotate_after_vmap(patch):
    rotate(patch, compound_rules.Vmapped)


@caught_by(f"{LAST}[dropped]")
def a_dropout_mask_for_each_stream(patch):
    def emit(self, graph, step, lifted, before):
        with graph.inserting_before(before):
            return graph.node_copy(step.node, lambda _: lifted[step.operands[0]])

    patch.setattr(compound_rules.Dropped, "emit", emit)


@caught_by(f"{FIRST}[batch norm: training]")
def batch_norm_of_each_stream(patch):
    def emit(self, graph, step, lifted, before):
        def normalise(streams):
            return (streams - streams.mean((0, 1), True)) / (streams.var((0, 1), keepdim=True) + 1e-5).sqrt()

        return trace_into(graph, normalise, [lifted[step.operands[0]]], before=before, like=step.node)

    patch.setattr(compound_rules.BatchNorm, "emit", emit)


# --- planning
# --------------------------------------------------------------------------------------------------


@caught_by(f"{STRUCTURE}[hidden states]")
def a_site_is_dropped_from_the_plan(patch):
    find = chains.find

    def less(graph, provenance, edges):
        found = find(graph, provenance, edges)
        return Findings(found.sites[:-1], found.rejections, found.aliases)

    for module in (chains, planner):
        patch.setattr(module, "find", less)


@caught_by(f"{PRESERVED}[pre-norm-dropout-train-2]")
def nothing_is_rewritten(patch):
    for module in (chains, planner):
        patch.setattr(module, "find", lambda graph, provenance, edges: Findings((), (), Aliases(graph)))


@caught_by("test_match_residuals.py::test_other_adds_are_rejected_with_the_right_reason")
def products_without_weights_are_contractions(patch):
    for module in (dependence, finding):
        patch.setattr(module, "contracts", lambda *_: True)


@caught_by("test_match_residuals.py::test_other_adds_are_rejected_with_the_right_reason")
def detached_values_are_values(patch):
    for module in (dependence, sum_terms):
        patch.setattr(module, "passes_value", lambda _: True)


@caught_by("test_match_residuals.py::test_other_adds_are_rejected_with_the_right_reason")
def writes_are_not_seen(patch):
    patch.setattr(Aliases, "writers", lambda self, node: ())


@caught_by("test_chains.py::test_cheap_trunk_operations_are_lifted")
def nothing_runs_under_vmap(patch):
    patch.setattr(compound_rules.Vmapped, "axis", lambda self, step: None)


# --- rewriting
# --------------------------------------------------------------------------------------------------


@caught_by(f"{STRUCTURE}[nested, after a smaller site]")
def inner_chains_are_expanded_first(patch):
    def backwards(values, key=None, reverse=False):
        return sorted(values, key=key, reverse=reverse or key is not None)

    patch.setattr(expand_streams, "sorted", backwards, raising=False)


@caught_by(f"{STRUCTURE}[long skip]")
def a_long_skip_adds_the_mean(patch):
    patch.setattr(expand_streams._Expansion, "_known", lambda self, node: None)


@caught_by(f"{STRUCTURE}[hidden states]")
def the_read_out_is_the_sum(patch):
    patch.setattr(
        StreamBuilder, "_end", lambda self, end, eps, streams, pre: self._call("read_out", torch.sum, streams, -2)
    )


@caught_by(f"{STRUCTURE}[hidden states]")
def the_read_out_is_the_mean_of_the_tokens(patch):
    patch.setattr(
        StreamBuilder, "_end", lambda self, end, eps, streams, pre: self._call("read_out", torch.mean, streams, -3)
    )


@caught_by("test_backend.py::test_the_graph_that_reaches_the_inner_compiler")
def declarations_stay(patch):
    patch.setattr(RemoveDeclarations, "apply", lambda self, graph: graph)


@caught_by("test_functionalize.py::test_observable_writes_keep_their_spelling")
def views_of_written_tensors_are_forgotten(patch):
    patch.setattr(functionalize, "_private", lambda *_: True)


@caught_by("test_normalize_adds.py::test_every_spelling_becomes_torch_add")
def additions_keep_their_spelling(patch):
    patch.setattr(NormalizeAdds, "apply", lambda self, graph: graph)


@caught_by("test_fuse_sites.py::test_copies_are_never_written")
def copies_are_not_folded(patch):
    patch.setattr(fuse_sites, "_fold_copies", lambda graph: None)


@caught_by("test_fuse_sites.py::test_a_chain_is_one_read_steps_and_one_close")
def nothing_is_fused(patch):
    patch.setattr(FuseSites, "apply", lambda self, graph: graph)


@caught_by("test_lazy_streams.py::test_streams_are_written_at_every_length_th_step")
def all_streams_are_written(patch):
    patch.setattr(LazyStreams, "apply", lambda self, graph: graph)


@caught_by("test_lazy_streams.py::test_the_graph_computes_the_same[3]")
def the_last_branch_is_the_first_source(patch):
    then = lazy_streams._Sources.then

    def turned(self, *site):
        streams, branches, *rest = then(self, *site)
        return lazy_streams._Sources(streams, branches[::-1], *rest)

    patch.setattr(lazy_streams._Sources, "then", turned)


@caught_by("test_recompute.py::test_all_but_the_first_step_of_a_block_are_marked")
def nothing_is_recomputed(patch):
    patch.setattr(RecomputeSteps, "apply", lambda self, graph: graph)


# --- mathematics
# --------------------------------------------------------------------------------------------------


def change_coefficients(patch, change):
    coefficients = reference.coefficients
    patch.setattr(reference, "coefficients", lambda *args: change(*coefficients(*args)))


@caught_by(f"{STRUCTURE}[hidden states]")
def pre_and_post_are_swapped(patch):
    change_coefficients(patch, lambda pre, post, res, z: (post, pre, res, z))


@caught_by(f"{STRUCTURE}[hidden states]")
def the_residual_matrix_is_transposed(patch):
    change_coefficients(patch, lambda pre, post, res, z: (pre, post, res.mT, z))


@caught_by(f"{STRUCTURE}[hidden states]")
def eps_is_forgotten(patch):
    inverse = reference.inverse_rms
    patch.setattr(reference, "inverse_rms", lambda flat, eps: inverse(flat, 0.0))


@caught_by(f"{STRUCTURE}[hidden states]")
def one_iteration_is_missing(patch):
    matrix = Sinkhorn.matrix
    patch.setattr(Sinkhorn, "matrix", lambda self, logits, n, iterations: matrix(self, logits, n, iterations - 1))


@caught_by("test_hyper_connection.py::test_the_lean_rotates_with_the_index")
def every_site_leans_to_the_first_stream(patch):
    reset = HyperConnection.reset_parameters

    def lean(self):
        self.index = 0
        reset(self)

    patch.setattr(HyperConnection, "reset_parameters", lean)


def change_backward(patch, change):
    """Put a kernel for CPU in front of the one for all devices."""
    backward = reference.coefficients_backward
    library = torch.library.Library("mhc", "IMPL")
    patch.callbacks.append(library._destroy)

    def wrong(*args):
        return tuple(gradient.contiguous() for gradient in change(*backward(*args)))

    library.impl("coefficients_backward", wrong, "CPU")


@caught_by(f"{STRUCTURE}[hidden states]")
def the_gradient_of_phi_lacks_its_last_logit(patch):
    def change(streams, phi, bias, scale):
        return streams, torch.cat([phi[:, :-1], torch.zeros_like(phi[:, -1:])], 1), bias, scale

    change_backward(patch, change)


@caught_by(f"{STRUCTURE}[hidden states]")
def the_gradient_of_the_scales_is_rotated(patch):
    change_backward(patch, lambda streams, phi, bias, scale: (streams, phi, bias, scale.roll(1)))


# --- the harness
# --------------------------------------------------------------------------------------------------


class Patch(pytest.MonkeyPatch):
    """A monkeypatch that also takes back what is registered with torch."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks = []

    def undo(self) -> None:
        super().undo()
        while self.callbacks:
            self.callbacks.pop()()


class Reports:
    """The tests that ran, each with the type of what it raised, None if it passed."""

    def __init__(self) -> None:
        self.raised: dict[str, type[BaseException] | None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" or call.excinfo is not None:
            self.raised[item.nodeid] = call.excinfo.type if call.excinfo is not None else None
        return (yield)


def run(tests) -> dict[str, type[BaseException] | None]:
    """Run tests, given as `file.py::name`, in this process.

    Files are found by name in any folder.
    """
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    named = [f"{files[test.partition('::')[0]]}::{test.partition('::')[2]}" for test in tests]
    without = ("terminal", "cacheprovider", "xdist", "faulthandler", "logging", "hypothesispytest")
    reports = Reports()
    flags = ["-o", "addopts=", "--import-mode=importlib", *(word for name in without for word in ("-p", f"no:{name}"))]
    pytest.main([*flags, *named], plugins=[reports])
    return reports.raised


def test_the_tests_pass_without_a_mutation():
    tests = sorted({test for test, _ in MUTATIONS.values()})
    raised = run(tests)
    assert len(raised) >= len(tests)
    assert not any(raised.values()), raised


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name):
    test, mutate = MUTATIONS[name]
    with Patch.context() as patch:
        mutate(patch)
        raised = run([test])
    assert AssertionError in raised.values(), (test, raised)
