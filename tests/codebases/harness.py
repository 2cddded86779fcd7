"""Run the programs of public code bases under `mhc run`, and record what they did.

They run in an environment of their own, because their packages exclude each other's versions and
some of what the other tests need: `python3 -m venv .codebases`, filled as `.ci/run` does.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "codebases"
SCRIPTS = HERE / "scripts"
TABLE = ROOT / "examples" / "codebases" / "README.md"

#: The Python that the programs run in.
PYTHON = os.environ.get("MHC_CODEBASES_PYTHON") or next(
    (str(python) for python in [ROOT / ".codebases" / "bin" / "python"] if python.exists()), sys.executable
)


def environment(apart: str = "") -> dict[str, str]:
    """Return the environment of a program: this checkout, one thread, no network.

    `apart` is a folder of the environment for packages that exclude those of the others.
    """
    path = [str(ROOT), str(HERE / "stand_in"), str(SCRIPTS), str(Path(PYTHON).parents[1] / apart) if apart else ""]
    path.append(os.environ.get("PYTHONPATH", ""))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


@cache
def version(package: str, apart: str = "") -> str | None:
    """Return the version of a package in the programs' environment, None if it is not there."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    command, env = [PYTHON, "-c", code, package], environment(apart)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def needs(*packages: str, apart: str = "") -> pytest.MarkDecorator:
    """Skip without these packages in the programs' environment."""
    missing = [package for package in packages if version(package, apart) is None]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"no {', '.join(missing)} in the environment of the code bases, {PYTHON}; .ci/run shows how it is made",
    )


class Program:
    """A program's command lines in one folder, under `mhc run` or plain.

    Args:
        folder: the current directory of every command.
        flags: of `mhc run`.
        apart: see `environment`.
    """

    def __init__(self, folder: Path, *flags: str, apart: str = "") -> None:
        self.folder = folder
        self.environment = environment(apart)
        self.flags = ["--inner-backend", "aot_eager", *flags]
        self.planned: list[str] = []

    def plan(self, *command: str) -> int:
        """Make the plan of a command line, which later runs use; return the number of its sites."""
        done = self._run("-m", "mhc_compile", "plan", *self.flags, "-o", "mhc.json", *command)
        assert done.returncode == 0, done.stderr
        self.planned = ["--plan", "mhc.json"]
        plan = json.loads((self.folder / "mhc.json").read_text())
        return sum(len(model["connections"]) for model in plan["models"])

    def run(self, *command: str, mhc: bool = True, warns: str = "") -> subprocess.CompletedProcess[str]:
        """Run `python COMMAND`, or `mhc run COMMAND`; a non-zero exit fails the test.

        So does an `MhcWarning`, unless all of them contain the text `warns`.
        """
        prefix = ["-m", "mhc_compile", "run", *self.planned, *self.flags] if mhc else []
        done = self._run(*prefix, *command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
        warned = [line for line in (done.stdout + done.stderr).splitlines() if "MhcWarning" in line]
        assert all(warns and warns in line for line in warned), warned
        return done

    def kill(self, text: str, *command: str) -> None:
        """Kill `mhc run COMMAND` as soon as a line of its output has this text."""
        prefix = ["-u", "-m", "mhc_compile", "run", *self.planned, *self.flags]
        with subprocess.Popen(
            [PYTHON, *prefix, *command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if text in line:
                    process.kill()
        assert process.returncode == -signal.SIGKILL, "".join(lines)

    def reference(self, code: str) -> list[Any]:
        """Return what the model gives on streams, by Python code that calls `reference.both`."""
        done = self._run("-c", f"import torch\nfrom reference import both\n{code}")
        assert done.returncode == 0, done.stderr
        plain, streams = json.loads(done.stdout.splitlines()[-1])
        assert plain != streams, "the plain model gives the same, so nothing is tested"
        return streams

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PYTHON, *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


def load(file: Path) -> dict[str, Any]:
    """Return what torch.save wrote."""
    return torch.load(file, map_location="cpu", weights_only=False)


def stripped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the prefix that torch.compile puts before names."""
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def connections(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the parameters of hyper-connections in a state dict."""
    return {name: value for name, value in state.items() if ".mhc." in f".{name}"}


def sites(state: Mapping[str, Any]) -> int:
    """Return how many complete hyper-connections a state dict holds."""
    kinds = Counter(name.rpartition(".")[2] for name in connections(state))
    assert set(kinds) == {"phi", "bias", "scale"}, kinds
    assert len(set(kinds.values())) == 1, kinds
    return kinds["phi"]


def assert_moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Expect the same hyper-connections in both state dicts, and every parameter to differ."""
    first, second = connections(before), connections(after)
    assert first.keys() == second.keys()
    assert first
    still = [name for name in first if torch.equal(first[name], second[name])]
    assert not still, f"not trained: {still}"


def assert_equal(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Expect the same names and, to `tolerance`, the same tensors."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    apart = {name: float((one[name].double() - other[name].double()).abs().max()) for name in tensors}
    wrong = {name: distance for name, distance in apart.items() if not distance <= tolerance}
    assert not wrong, wrong


def assert_each_in_one(state: Mapping[str, torch.Tensor], *optimizers: Mapping[str, Any]) -> None:
    """Expect optimizers to hold each parameter of a state dict once.

    An optimizer's state names no parameters; the shapes of its averages are compared as a multiset.

    Args:
        state: the parameters, no buffers.
        optimizers: their state dicts.
    """
    held = [index for optimizer in optimizers for group in optimizer["param_groups"] for index in group["params"]]
    assert len(held) == len(state), f"{len(held)} parameters in optimizers, {len(state)} in the model"
    averages: Iterable[torch.Tensor] = (
        next(value for name, value in entry.items() if isinstance(value, torch.Tensor) and name != "step")
        for optimizer in optimizers
        for entry in optimizer["state"].values()
    )
    assert Counter(tuple(value.shape) for value in averages) == Counter(tuple(value.shape) for value in state.values())


def stir(state: Mapping[str, torch.Tensor], weights: float = 0.0, seed: int = 1) -> None:
    """Move the hyper-connections of a state dict so far that streams and plain adds differ.

    `weights` is the standard deviation of what is added to all other matrices, for programs that
    show nothing but the likeliest tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ours = connections(state).keys()
    for name, value in state.items():
        if name.endswith(".scale") and name in ours:
            value.fill_(0.5 * 128)  # the default speeds, 1/128 and 32
        elif name.endswith(".bias") and name in ours:
            value.add_(torch.randn(value.shape, generator=generator) * 0.7 / 32)
        elif name in ours or (weights and value.is_floating_point() and value.dim() > 1):
            value.add_(torch.randn(value.shape, generator=generator) * (0.7 if name in ours else weights))


@dataclass
class Row:
    """A row of the table in `examples/codebases/README.md`."""

    codebase: str
    command: str
    trains: str = "no"
    in_optimizer: str = "no"
    resumes: str = "no"
    evaluates: str = "no"
    checkpoint: str = "no"
    notes: str = ""

    def record(self, regenerate: bool) -> None:
        """Write this row into the table, or expect it there."""
        line = "| " + " | ".join(str(getattr(self, field.name)) for field in fields(self)) + " |"
        with TABLE.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tests run in several processes
            lines = file.read().splitlines()
            start = f"| {self.codebase} | {self.command} |"
            if not regenerate:
                assert line in lines, f"if this is meant: pytest --regenerate\n{line}"
                return
            last = max(number for number, text in enumerate(lines) if text.startswith("|"))
            rows = [number for number, text in enumerate(lines) if text.startswith(start)]
            if rows:
                lines[rows[0]] = line
            else:
                lines.insert(last + 1, line)
            file.seek(0)
            file.write("\n".join(lines) + "\n")
            file.truncate()
