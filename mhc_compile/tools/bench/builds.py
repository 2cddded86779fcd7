"""A candidate's workload: its model or site, under its compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import ops
from mhc_compile._torch import compile_with_inductor, isolated_compile
from mhc_compile.tools.bench.workloads import SITES, Block, ForwardWorkload, SiteWorkload, StepWorkload, batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from mhc_compile.tools.bench.candidates import Candidate, Compiler
    from mhc_compile.tools.bench.sites import Shape
    from mhc_compile.tools.bench.workloads import Workload


def build(kind: str, shape: Shape, candidate: Candidate, repeats: int = SITES) -> tuple[nn.Module, Workload]:
    """Return the module of a "site", "step" or "forward", and its workload; its first run compiles.

    A site runs `repeats` times, each with its own tensors.
    """
    torch.manual_seed(0)
    if kind != "site":
        model = candidate.model(shape)
        options = {"streams": shape.streams, "iterations": shape.iterations, **candidate.options}
        call = compiled(model, candidate.compiler, options)
        if kind == "forward":
            return model, ForwardWorkload(shape.device, call, batch(shape))
        return model, StepWorkload(shape.device, call, model, batch(shape))
    module, first = candidate.site(shape)
    inputs = [first, *(tuple(t.detach().clone().requires_grad_() for t in first) for _ in range(repeats - 1))]
    return module, SiteWorkload(shape.device, compiled(module, candidate.site_compiler), module, inputs)


def compiled(module: nn.Module, compiler: Compiler, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Return `module` under a candidate's compiler; compilation happens at the first call."""
    if compiler == "eager":
        return module
    if compiler.startswith("mhc"):
        recompute = compiler.removeprefix("mhc").removeprefix("-") or "cheap"
        return torch.compile(module, backend="mhc", options={"recompute": recompute, **(options or {})})
    if compiler == "blocks":
        for block in module.modules():
            if isinstance(block, Block):
                block.attn.compile()
                block.mlp.compile()
        return module
    # Isolated: the cells of all candidates share a code object, and Dynamo limits its compilations.
    return isolated_compile(module, _inductor if compiler == "operators" else "inductor")  # type: ignore[arg-type]


def _inductor(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile as the backend does with a rewritten graph."""
    return compile_with_inductor(
        graph_module, inputs, ops.fused_decompositions(), ops.externs(), None, {}, f"mhc-{ops.fingerprint()}"
    )
