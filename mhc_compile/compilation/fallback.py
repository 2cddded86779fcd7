"""What happens when a pass, a lift, the planner or the inner compiler fails.

The chain concerned keeps its residual adds, and the others are rewritten. One warning names the
chain and the exception, which is logged; with `strict` it is an error.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mhc_compile.compilation.faults import Fault, describe, is_fault
from mhc_compile.compilation.inner_compiler import fuse, fusion_passes, module_like
from mhc_compile.compilation.messages import warn_failed
from mhc_compile.compilation.module_parameters import PredictedParameters
from mhc_compile.passes import Chain, Plan, Reason, expand_plan
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.chain_rejections import reject_site

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.compilation.session import GraphSession

T = TypeVar("T")
log = logging.getLogger(__name__)


def attempt(session: GraphSession, task: Callable[[], T]) -> T:
    """Return the result of `task`, without the chains with which it fails.

    What fails without chains too is the fault of no rewrite, and raised.
    """
    while True:
        try:
            return task()
        except Exception as error:
            if not is_fault(error) or (session.left_plain and not session.plan.chains):
                raise
            log.debug("%s: a rewrite failed", session.provenance.frame.location, exc_info=True)
            try:
                _drop(session, task, error)
            except Exception as later:  # the planner itself may have failed
                if not is_fault(later):
                    raise
                log.debug("%s: planning failed", session.provenance.frame.location, exc_info=True)
                session.leave_plain(later)


def _drop(session: GraphSession, task: Callable[[], object], error: Exception) -> None:
    """Reject the chains with which `task` fails: those that fail alone, or else all."""
    plan = session.plan
    if not plan.chains:
        session.leave_plain(error)
        return
    failing = {}
    for chain in plan.chains if len(plan.chains) > 1 else ():
        session.planner.replace_plan(_only(plan, chain))
        try:
            task()
        except Exception as alone:
            if not is_fault(alone):
                raise
            log.debug("the chain of %s fails alone", chain.sites[0].path, exc_info=True)
            failing[chain] = alone
    for chain, cause in (failing or dict.fromkeys(plan.chains, error)).items():
        subclass = not _is_plain(chain)
        reason = Reason.TENSOR_SUBCLASS if subclass else Reason.FAILED
        session.planner.reject({site.add: reject_site(site, reason, partial(describe, cause)) for site in chain.sites})
        if not subclass:
            session.faults.append(Fault(cause, tuple(site.path for site in chain.sites)))


def _only(plan: Plan, chain: Chain) -> Plan:
    heads = (head for head in plan.heads if head.value.op == "placeholder" or head.value is chain.sites[-1].add)
    return Plan((chain,), plan.rejections, tuple(heads))


def _is_plain(chain: Chain) -> bool:
    """Return whether the trunk is a plain tensor, whose example value is a fake one."""
    return hasattr(tensor_value(chain.start), "fake_mode")


def try_out(session: GraphSession) -> PredictedParameters:
    """Reject the chains that cannot be rewritten, before any parameter is created for them.

    The graph is expanded and fused as it will be, with stand-ins for missing parameters, which are
    returned. Those of a tensor subclass, such as DTensor, cannot be foreseen.
    """

    def task() -> PredictedParameters:
        parameters = PredictedParameters(session.graph, session.provenance)
        planned = parameters.resolve(session.planner, session.options)
        if not planned or not all(map(_is_plain, session.plan.chains)):
            return parameters
        try:
            bindings = {item.site: parameters.bind(item) for item in planned}
            graph = expand_plan(session.graph, session.plan, bindings, openings=parameters.openings(session.plan))
            fuse(module_like(session.captured, graph), fusion_passes(session.options))
        except Exception:
            parameters.forget()
            raise
        return parameters

    return attempt(session, task)


def leave_failing_plain(session: GraphSession) -> None:
    """Reject the chains that cannot be rewritten, if parameters are to be created.

    Raises:
        RewriteError: there is such a chain, with `strict`.
    """

    def missing() -> bool:
        planned = session.parameters.resolve(session.planner, session.options)
        return any(session.parameters.existing(item) is None for item in planned)

    if attempt(session, missing):
        try_out(session).forget()
    if session.options.strict:
        report(session)


def report(session: GraphSession) -> None:
    """Log exceptions, and warn of the chains that stay plain; if `strict`, raise RewriteError."""
    if not session.faults:
        return
    for fault in session.faults:
        log.warning("a rewrite failed: %s", ", ".join(fault.sites) or "whole graph", exc_info=fault.error)
    described = [(fault.sites, describe(fault.error)) for fault in session.faults]
    idle = session.idle_connections()
    warn_failed(described, session.provenance.frame.location, idle, session.options, session.faults[0].error)
