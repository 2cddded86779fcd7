"""Compiles launches of Triton kernels for sm_90 (H100, H200) without a GPU, and counts."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Registers and bytes of shared memory of one processor, and bytes that one program can have.
REGISTERS, SHARED, LARGEST = 65536, 233472, 232448
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: of a thread.
        spilled: instructions that store or load a register for want of others.
        shared: bytes of shared memory.
        warps: of a program.
        instructions: of a warp, each counted once.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    instructions: int

    @property
    def programs(self) -> int:
        """How many programs a processor holds at once."""
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // self.warps
        return min(by_registers, SHARED // (1024 + self.shared), 64 // self.warps, 32)


def specialised(launch):
    """Signature, constants and attributes of a launch, as Triton's own launcher chooses them."""
    constants = {name: value for name, value in launch.constants.items() if name not in _OPTIONS}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
            continue
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name], aligned = f"*{_TYPES[value.dtype]}", True
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constexprs[(place,)], aligned = "constexpr", value, False
        else:
            signature[name], aligned = "i32", value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def options_of(launch):
    return {name: launch.constants[name] for name in _OPTIONS if name in launch.constants}


def key_of(launch) -> str:
    """What makes two launches run the same machine code."""
    return f"{launch.kernel.fn.__name__} {specialised(launch)} {options_of(launch)}"


def compile_for_sm90(launch) -> Compiled:
    signature, constexprs, attributes = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options_of(launch))
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


def moved(launches) -> int:
    """Bytes of all tensors of some launches, each counted once a launch.

    So much has to come from and go to memory where a second walk finds what it reads in the cache.
    A tensor without numbers, or one that stands for another that is absent, counts nothing.
    """
    total = 0
    for launch in launches:
        tensors = {id(t.untyped_storage()): t for t in launch.arguments if isinstance(t, torch.Tensor)}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    return total
