"""`--busy`: another process on every core while things are timed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["busy_cores", "cores"]

# Ends by itself when the process that started it is gone, however that happened.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))\n"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """Keeps one process per core computing in here, if `wanted`."""
    spinning = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(cores() if wanted else 0)]  # noqa: S603
    try:
        yield
    finally:
        for process in spinning:
            process.terminate()
        for process in spinning:
            process.wait()
