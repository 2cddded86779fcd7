"""The machine and the software that a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine_conditions(device: str) -> dict[str, Any]:
    """Return what the speed of a process on `device`, "cpu" or "cuda", depends on, as data.

    The model of the processor or GPU, `cores`, `threads` (of torch), the versions of `torch` and
    `python`, and `wait_policy` (of OpenMP's threads, "unset" without `OMP_WAIT_POLICY`).
    """
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset").lower(),
    }


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Return the runnable processes, averaged over a minute; 0.0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def processor_name() -> str:
    """Return the processor's model, or its architecture where the model is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
