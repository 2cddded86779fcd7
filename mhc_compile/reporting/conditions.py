"""The machine and the software that a measurement ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
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


#: What is asked of the driver.
_ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"


def gpu_state(device: str) -> dict[str, str]:
    """Return versions, clocks, power and temperature of the current GPU, by name, with units.

    Nothing for `device` "cpu". What `nvidia-smi` does not tell is not there; "triton" is its
    version.
    """
    if device != "cuda":
        return {}
    import torch

    uuid = torch.cuda.get_device_properties("cuda").uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - no input
        values = done.stdout.strip().split(", ")
    except (OSError, subprocess.SubprocessError):
        values = []
    state = dict(zip(_ASKED.split(","), values, strict=False))
    try:
        state["triton"] = version("triton")
    except PackageNotFoundError:
        state["triton"] = "not installed"
    return state | {"cuda": str(torch.version.cuda)}


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
