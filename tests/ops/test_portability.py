"""The C++ kernels as the compilers of other machines see them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: g++ for another machine: instead of the flags of this one. Every call is noted.
COMPILER = """#!{python}
import os, sys
known = [flag for flag in sys.argv[1:] if not flag.startswith(("-march", "-mavx", "-mfma", "-mamx"))]
open({log!r}, "a").write("called" + chr(10))
os.execv({gcc!r}, [{gcc!r}, *known, "-march={machine}"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86-64", "haswell", "skylake-avx512"])
def test_the_kernels_of_other_machines(machine, tmp_path):
    """x86-64 has no wide vectors, as a compiler for NEON sees the headers; haswell has AVX2; the
    last AVX-512 without products of bfloat16.
    """
    gcc = shutil.which("g++")
    if gcc is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ for x86-64")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if machine != "x86-64" and {"haswell": "avx2", "skylake-avx512": "avx512bw"}[machine] not in flags:
        pytest.skip(f"this machine cannot run code for {machine}")
    compiler, log = tmp_path / "g++", tmp_path / "log"
    compiler.write_text(COMPILER.format(python=sys.executable, gcc=gcc, log=str(log), machine=machine))
    compiler.chmod(0o755)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-m",
            "not slow",
            "-k",
            "every_dtype",
            "tests/ops/test_steps.py",
        ],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().count("called") > 3, "the kernels were not built"
