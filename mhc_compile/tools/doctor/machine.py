"""What the machine can do: compile C++, use a GPU, keep what was compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile.tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["accelerator", "caches", "compiler"]

_PROGRAM = (
    "#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? std::floor(0.5) : 1; }\n"
)
#: Inductor keeps a few MB for every graph.
_ROOM = 1 << 30


def compiler() -> Iterator[Finding]:
    """The C++ compiler that Inductor calls, and whether it compiles."""
    from mhc_compile import _torch

    advice = (
        "Install one (apt install g++, or Xcode's command line tools), or set CXX to one that works."
        " Without it use options={'inner_backend': 'aot_eager'}."
    )
    try:
        path = _torch.cpp_compiler()
    except Exception as error:
        yield Finding("C++ compiler", "failed", _line(error), advice)
        return
    version = _run([path, "--version"])
    if version.returncode != 0:
        yield Finding("C++ compiler", "failed", f"{path}: {_last(version)}", advice)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(_PROGRAM)
        done = _run([path, "-std=c++17", "-fopenmp", str(source), "-o", str(program)])
        if done.returncode == 0:
            done = _run([str(program)])
    if done.returncode != 0:
        yield Finding(
            "C++ compiler", "failed", f"{path} does not compile a small program with OpenMP: {_last(done)}", advice
        )
    else:
        yield Finding(
            "C++ compiler", "ok", f"{path}, {version.stdout.splitlines()[0] if version.stdout else 'no version'}"
        )


def accelerator() -> Iterator[Finding]:
    """GPU and Triton."""
    import torch

    triton = find_spec("triton") is not None
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
        yield Finding("GPU", "ok", f"none in use; torch is {built}")
        return
    yield Finding("GPU", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    if triton:
        yield Finding("Triton", "ok", "installed")
    else:
        yield Finding("Triton", "failed", "not installed", "Inductor needs it on a GPU: pip install triton.")


def caches() -> Iterator[Finding]:
    """Where compiled code is kept, and whether it can be."""
    from mhc_compile import _torch

    try:
        folder = Path(_torch.cache_folder())
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
        advice = "Make it writable, or set TORCHINDUCTOR_CACHE_DIR to a folder that is."
        yield Finding("compile cache", "failed", f"{where} cannot be written: {_line(error)}", advice)
        return
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {size / 2**20:.0f} MB, {free / 2**30:.0f} GB free"
    if free < _ROOM:
        advice = f"Make room; the cache may be deleted as a whole: rm -r {folder}"
        yield Finding("compile cache", "warning", found, advice)
    else:
        yield Finding("compile cache", "ok", found)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - the user's own compiler
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
