"""The checks, each with the name of its result: the installation, the machine, a tiny compile."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile import __version__
from mhc_compile.tools.doctor.check_result import Problem
from mhc_compile.tools.doctor.smoke_test import smoke_test

if TYPE_CHECKING:
    from collections.abc import Callable

#: The oldest torch that works, and the newest that the use of its internals was tested on.
_OLDEST, _TESTED = "2.11", "2.13"
#: Optional packages and their users.
_OPTIONAL = {
    "transformers": "hf: targets, mhc demo, Trainer",
    "accelerate": "Trainer and accelerate's loops",
    "lightning": "Lightning's Trainer",
    "safetensors": "checkpoints in that format",
    "matplotlib": "mhc demo, --png of mhc bench and mhc stability",
    "hyper-connections": "a peer in mhc bench",
}
_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")  # which have a check each
#: Prefixes of variables that change how models are compiled.
_PREFIXES = (*"TORCHINDUCTOR_ TORCHDYNAMO_ TORCH_COMPILE_ TORCH_LOGS CXX OMP_ KMP_ TRITON_ MHC_TRITON_".split(),)
_PROGRAM = "#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() ? std::floor(0.5) : 1; }\n"
#: Free bytes below which the cache gets a warning: Inductor keeps a few MB for every graph.
_ROOM = 1 << 30


def _compiling_enabled(name: str) -> None:
    if os.environ.get(name, "0") not in {"", "0"}:
        raise Problem(f"{os.environ[name]}: torch.compile does nothing", f"Unset {name}.")


def _wait_policy() -> None:
    if (os.cpu_count() or 1) > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        advice = "On a shared machine, waiting threads that spin make steps many times slower: set it to PASSIVE."
        raise Problem("ACTIVE", advice, status="warning")


def _variables() -> str:
    names = sorted(name for name in os.environ if name.startswith(_PREFIXES) and name not in _SWITCHES)
    shown = ", ".join(f"{name}={os.environ[name]}" for name in names)
    return shown or "nothing that changes how models are compiled"


def _torch_version() -> str:
    import torch

    found = torch.__version__
    number, oldest, tested = ([int(part) for part in one.split(".")[:2]] for one in (found, _OLDEST, _TESTED))
    if number < oldest:
        raise Problem(found, f"Install torch {_OLDEST} or newer.")
    if number > tested:
        advice = f"Newer than {_TESTED}, the last that was tested. If something fails, install that one."
        raise Problem(found, advice, status="warning")
    return found


def _torch_internals() -> str:
    try:
        importlib.import_module("mhc_compile._torch")
    except (ImportError, AttributeError) as error:
        advice = f"This torch moved something that is used. Install torch {_TESTED}, or a newer mhc-compile."
        raise Problem(str(error), advice) from error
    return "all that are used are there"


def _entry_point() -> str:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="mhc")
    targets = sorted({point.value for point in points})
    if not targets:
        advice = "Install the package (pip install -e . in a checkout), or pass backend=mhc_compile.mhc."
        raise Problem("no entry point of that name is installed", advice)
    if targets != ["mhc_compile.backend:mhc"]:
        advice = "Uninstall the other package, or pass backend=mhc_compile.mhc."
        raise Problem(f"the name belongs to {', '.join(targets)}", advice)
    return targets[0]


def _optional_packages() -> str:
    installed, missing = [], []
    for name, purpose in _OPTIONAL.items():
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} ({purpose})")
    return (", ".join(installed) or "none") + (f"; not installed: {', '.join(missing)}" if missing else "")


def _compiler() -> str:
    from mhc_compile import _torch

    try:
        path = _torch.cpp_compiler()
        version = _run(path, "--version")
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
            source.write_text(_PROGRAM)
            _run(path, "-std=c++17", "-fopenmp", str(source), "-o", str(program))
            _run(str(program))
    except Exception as error:  # Inductor documents no class; the result has its message
        advice = (
            "Install one (apt install g++, or Xcode's command line tools), or set CXX to one that works."
            " Without it use options={'inner_backend': 'aot_eager'}."
        )
        raise Problem(_first_line(error), advice) from error
    return f"{path}, {version}"


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    return f"none in use; torch is {built}"


def _triton() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    if find_spec("triton") is None:
        raise Problem("not installed", "Inductor needs it on a GPU: pip install triton.")
    from mhc_compile.ops import triton

    version = importlib.metadata.version("triton")
    if reason := triton.reason(torch.device("cuda", torch.cuda.current_device())):
        advice = "Hyper-connections run as operations that Inductor fuses: right, but slower."
        raise Problem(f"{version}; no kernels of this package: {reason}", advice, status="warning")
    return f"{version}, with kernels for hyper-connections"


def _cache() -> str:
    from mhc_compile import _torch

    try:
        folder = Path(_torch.cache_folder())
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
        advice = "Make it writable, or set TORCHINDUCTOR_CACHE_DIR to a folder that is."
        raise Problem(f"{where} cannot be written: {_first_line(error)}", advice) from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {size / 2**20:.0f} MB, {free / 2**30:.0f} GB free"
    if free < _ROOM:
        raise Problem(found, f"Make room; the cache may be deleted as a whole: rm -r {folder}", status="warning")
    return found


def _run(*words: str) -> str:
    """Run a command and return the first line of its output; raise RuntimeError where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - the user's compiler
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{' '.join(words[:2])}: {lines[-1].strip()}")
    return done.stdout.split("\n")[0] or "no version"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


#: The variables come before torch is imported, which sets some.
CHECKS: dict[str, Callable[[], str | None]] = {
    **{name: partial(_compiling_enabled, name) for name in _SWITCHES},
    "OMP_WAIT_POLICY": _wait_policy,
    "environment": _variables,
    "Python": lambda: f"{platform.python_version()} ({sys.executable})",
    "mhc-compile": lambda: __version__,
    "torch": _torch_version,
    "torch internals": _torch_internals,
    'backend="mhc"': _entry_point,
    "optional packages": _optional_packages,
    "C++ compiler": _compiler,
    "GPU": _gpu,
    "Triton": _triton,
    "compile cache": _cache,
    "tiny compile": smoke_test,
}
