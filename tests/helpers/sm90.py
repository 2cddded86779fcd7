"""Compiles launches of Triton kernels for sm_90 (H100, H200) without a GPU, and counts."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Registers and shared memory of one processor of an H100.
REGISTERS, SHARED = 65536, 233472
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel.

    Attributes:
        registers: of a thread.
        spilled: instructions that store or load a register for want of others.
        shared: bytes of shared memory.
        warps: of a program.
        instructions: of a warp, each counted once, wherever it is.
        programs: how many of them a processor holds at once.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    instructions: int

    @property
    def programs(self) -> int:
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // self.warps
        return min(by_registers, SHARED // (1024 + self.shared), 64 // self.warps, 32)


def specialised(launch):
    """Signature, constants and attributes of a launch, as Triton's own launcher chooses them."""
    function = launch.kernel
    given = dict(zip(function.arg_names, launch.arguments, strict=False))
    constants = {name: value for name, value in launch.constants.items() if name not in _OPTIONS}
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
            continue
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constexprs[(place,)] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def key_of(launch) -> str:
    return f"{launch.kernel.fn.__name__} {specialised(launch)} {[launch.constants.get(name) for name in _OPTIONS]}"


def compile_for_sm90(launch) -> Compiled:
    return _compile(_Hashed(launch))


class _Hashed:
    def __init__(self, launch) -> None:
        self.launch, self.key = launch, key_of(launch)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other) -> bool:
        return self.key == other.key


@cache
def _compile(hashed: _Hashed) -> Compiled:
    launch = hashed.launch
    signature, constexprs, attributes = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {name: launch.constants[name] for name in _OPTIONS if name in launch.constants}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        used = _run("cuobjdump", "-res-usage", str(cubin))
        sass = _run("nvdisasm", "-c", str(cubin))
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", used)[1]),
        spilled=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
