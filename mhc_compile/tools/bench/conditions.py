"""What a run was measured under, and one line of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mhc_compile import __version__
from mhc_compile.tools.bench.load import cores
from mhc_compile.tools.bench.result import Conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.tools.bench.contenders import Contender
    from mhc_compile.tools.bench.shape import Shape

__all__ = ["gather", "load", "sentence"]


def gather(
    shape: Shape, contenders: Sequence[Contender], *, rounds: int, busy: bool, before: float, after: float
) -> Conditions:
    """Everything that the figures depend on."""
    versions = {contender.distribution: contender.installed() for contender in contenders}
    return Conditions(
        device=torch.cuda.get_device_name() if shape.device == "cuda" else _processor(),
        cores=cores(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        packages={"mhc-compile": __version__, **{name: one for name, one in versions.items() if one}},
        dtype=shape.dtype,
        width=shape.width,
        layers=shape.layers,
        tokens=shape.tokens,
        vocabulary=shape.vocabulary,
        streams=shape.streams,
        iterations=shape.iterations,
        rounds=rounds,
        busy=busy,
        wait_policy=os.environ.get("OMP_WAIT_POLICY", "unset").lower(),
        load=(before, after),
    )


def load() -> float:
    """Processes that wanted to run, one minute's average; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def sentence(conditions: Conditions) -> str:
    """One line for tables and charts."""
    c = conditions
    return (
        f"{c.device}, {c.cores} cores, {c.threads} threads ({c.wait_policy} waiting); torch {c.torch}; {c.dtype},"
        f" C = {c.width}, {c.tokens} tokens, {c.layers} layers, vocabulary {c.vocabulary}, n = {c.streams},"
        f" {c.iterations} Sinkhorn iterations; load {c.load[0]:.1f} before, {c.load[1]:.1f} after"
        + (", beside one busy process a core" if c.busy else "")
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
