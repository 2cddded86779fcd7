"""What is installed and how it is set: Python, torch, packages, the entry point, the environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import TYPE_CHECKING

from mhc_compile import __version__
from mhc_compile.tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["backend", "environment", "optional_packages", "versions"]

#: The oldest torch that the package asks for, and the one that its use of torch's internals was last run on.
_OLDEST, _TESTED = (2, 11), (2, 13)

#: What an optional package is for.
_OPTIONAL = {
    "transformers": "hf: targets, mhc demo, Trainer",
    "accelerate": "Trainer and accelerate's loops",
    "lightning": "Lightning's Trainer",
    "safetensors": "checkpoints in that format",
    "matplotlib": "mhc demo, --png of mhc bench and mhc stability",
    "hyper-connections": "a peer in mhc bench",
}

#: Variables that switch compiling off.
_OFF = {
    "TORCHDYNAMO_DISABLE": "torch.compile does nothing",
    "TORCH_COMPILE_DISABLE": "torch.compile does nothing",
}
#: Variables that change how it works, worth knowing of when it behaves oddly.
_PREFIXES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "TORCH_LOGS", "CXX", "OMP_", "KMP_", "TRITON_")


def versions() -> Iterator[Finding]:
    """Python, this package, torch, and the parts of torch that are not its public interface."""
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("mhc-compile", "ok", __version__)
    import torch

    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if number < _OLDEST:
        advice = f"Install torch {_OLDEST[0]}.{_OLDEST[1]} or newer."
        yield Finding("torch", "failed", torch.__version__, advice)
    elif number > _TESTED:
        advice = f"Newer than {_TESTED[0]}.{_TESTED[1]}, the last that this version was tested with. If something fails, install that one."
        yield Finding("torch", "warning", torch.__version__, advice)
    else:
        yield Finding("torch", "ok", torch.__version__)
    try:
        importlib.import_module("mhc_compile._torch")
    except (ImportError, AttributeError) as error:
        advice = f"This torch moved something that mhc-compile uses. Install torch {_TESTED[0]}.{_TESTED[1]}, or a newer mhc-compile."
        yield Finding("torch internals", "failed", str(error), advice)
    else:
        yield Finding("torch internals", "ok", "all that are used are there")


def backend() -> Iterator[Finding]:
    """Whether `backend="mhc"` is ours, and whether the command on the path is of this installation."""
    points = [point for point in importlib.metadata.entry_points(group="torch_dynamo_backends") if point.name == "mhc"]
    targets = sorted({point.value for point in points})
    if not targets:
        advice = "Install the package (pip install -e . in a checkout), so that torch finds its entry point; or pass backend=mhc_compile.mhc."
        yield Finding('backend="mhc"', "failed", "no entry point of that name is installed", advice)
    elif targets != ["mhc_compile.backend:mhc"]:
        advice = "Uninstall the other package, or pass backend=mhc_compile.mhc."
        yield Finding('backend="mhc"', "failed", f"the name belongs to {', '.join(targets)}", advice)
    else:
        yield Finding('backend="mhc"', "ok", targets[0])
    found, own = shutil.which("mhc"), os.path.join(os.path.dirname(sys.executable), "mhc")
    if found is None:
        where = f"Call {own}, or python -m mhc_compile." if os.path.exists(own) else "Call python -m mhc_compile."
        yield Finding("command mhc", "warning", "not on the PATH", where)
    elif os.path.exists(own) and not os.path.samefile(found, own):
        yield Finding("command mhc", "warning", f"{found} is of another installation", f"Call {own}.")
    else:
        yield Finding("command mhc", "ok", found)


def optional_packages() -> Iterator[Finding]:
    """Packages that some of the features need."""
    there, missing = [], []
    for name, purpose in _OPTIONAL.items():
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} ({purpose})")
    lines = ", ".join(there) or "none"
    yield Finding("optional packages", "ok", lines + (f"; not installed: {', '.join(missing)}" if missing else ""))


def environment() -> Iterator[Finding]:
    """Variables that change how models are compiled."""
    off = [name for name in _OFF if os.environ.get(name, "0") not in {"", "0"}]
    for name in off:
        yield Finding(name, "failed", f"{os.environ[name]}: {_OFF[name]}", f"Unset {name}.")
    if (os.cpu_count() or 1) > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        advice = "On a machine that others use too, waiting threads that spin make compiled steps many times slower: set it to PASSIVE."
        yield Finding("OMP_WAIT_POLICY", "warning", "ACTIVE", advice)
    others = sorted(name for name in os.environ if name.startswith(_PREFIXES) and name not in off)
    shown = ", ".join(f"{name}={os.environ[name]}" for name in others)
    yield Finding("environment", "ok", shown or "nothing that changes how models are compiled")
