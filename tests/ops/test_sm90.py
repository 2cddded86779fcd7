"""The Triton kernels compiled for sm_90, without a GPU: registers, spills, shared memory, launches
and bytes, against a table (`--regenerate` writes it).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "0":
    pytest.skip("needs Triton, and TRITON_INTERPRET=0", allow_module_level=True)

import triton
from helpers.sm90 import LARGEST, compile_for_sm90, key_of, moved
from helpers.tables import compare_rows

from mhc_compile.config.options import Options
from mhc_compile.config.presets import PRESETS
from mhc_compile.ops.norm_reference import NORMS
from mhc_compile.ops.triton import ahead

TABLE = Path(__file__).parent / "sm90.md"
#: The version of the table; others allocate registers otherwise.
VERSION = "3.9.0"
DEFAULT = Options().resolved.spec
V4 = str(PRESETS["deepseek-v4"].convention)
LIGER = str(PRESETS["liger"].convention)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
C, T = 2560, 4096
#: Streams, their dtype, the convention, and whether sites read with the weights of the site before.
#: Where the name ends with a norm, h has it; where it begins with "lazy", streams are.
KINDS = {
    "paper, n = 4, bfloat16": (4, BF16, DEFAULT, False),
    "single pass, n = 4, bfloat16": (4, BF16, V4, True),
    "deepseek-v4, n = 4, bfloat16": (4, BF16, V4, False),
    "liger, n = 4, bfloat16": (4, BF16, LIGER, False),
    "identity, n = 4, bfloat16": (4, BF16, "identity;pre_eps=1e-06;post_eps=1e-06", False),
    "permutations, n = 4, bfloat16": (4, BF16, "permutations", False),
    "kronecker, n = 4, bfloat16": (4, BF16, "kronecker", False),
    "unconstrained, n = 4, bfloat16": (4, BF16, "unconstrained", False),
    "paper, n = 2, bfloat16": (2, BF16, DEFAULT, False),
    "kronecker, n = 8, bfloat16": (8, BF16, "kronecker", False),
    "paper, n = 4, float32": (4, FP32, DEFAULT, False),
    "paper, n = 4, float16": (4, FP16, DEFAULT, False),
    "paper, n = 4, bfloat16, rms": (4, BF16, DEFAULT, False),
    "paper, n = 4, bfloat16, layer": (4, BF16, DEFAULT, False),
    "single pass, n = 4, bfloat16, rms": (4, BF16, V4, True),
    "lazy, n = 4, bfloat16": (4, BF16, DEFAULT, False),
    "lazy, n = 4, float32": (4, FP32, DEFAULT, False),
    "lazy, n = 4, bfloat16, layer": (4, BF16, DEFAULT, False),
}


def sites(kind: str, tokens: int = T):
    n, dtype, convention, single_pass = KINDS[kind]
    last = kind.split(", ")[-1]
    norm = last if last in NORMS else ""
    lazy = kind.startswith("lazy")
    found = ahead.launches_of(
        dtype, dtype, n, C, convention, tokens=tokens, single_pass=single_pass, lazy=lazy, norm=norm
    )
    seen = ("lazy",) if lazy else ("read", "step", "shifted", "mix") if norm else ("",)
    return {name: launches for name, launches in found.items() if name.startswith(seen)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_compiler_makes_of_the_kernels(kind, regenerate):
    n, *_ = KINDS[kind]
    rows, seen = [], set()
    for name, launches in sites(kind).items():
        for launch in launches:
            if key_of(launch) in seen:
                continue
            seen.add(key_of(launch))
            found, kernel = compile_for_sm90(launch), launch.kernel.fn.__name__
            what = f"{kind}, {name}, {kernel}: {found}"
            assert found.shared <= LARGEST, what
            assert found.programs >= 1, what
            if n <= 4:
                assert found.spilled <= {"forward_kernel": 45, "backward_kernel": 220}.get(kernel, 6), what
            if n <= 4 and kernel == "forward_kernel":
                assert found.programs >= 2, what
            numbers = (found.registers, found.spilled, found.shared, found.warps, found.instructions, found.programs)
            rows.append(f"| {kind} | {name} | {kernel.removesuffix('_kernel')} | {' | '.join(map(str, numbers))} |\n")
    compare_rows(TABLE, kind, rows, regenerate=regenerate, same_versions=triton.__version__ == VERSION)


def test_bytes_and_launches():
    """Launches and elements of a stream a token."""
    unit = T * C * 2
    limits = {
        "paper, n = 4, bfloat16": {"step": (2, 10.5), "step backward": (3, 17.3)},
        "deepseek-v4, n = 4, bfloat16": {"step": (2, 10.5), "step backward": (3, 17.3)},
        "single pass, n = 4, bfloat16": {
            "shifted step": (2, 10.5), "shifted step backward": (3, 17.4), "mix read": (1, 10.1), "mix read backward": (2, 15.9)
        },
        "paper, n = 4, bfloat16, rms": {"step": (2, 10.5), "step backward": (3, 17.4)},
        "single pass, n = 4, bfloat16, rms": {
            "shifted step": (2, 10.5), "shifted step backward": (3, 17.5), "mix read": (1, 10.1), "mix read backward": (2, 16.4)
        },
    }  # fmt: skip
    for kind, operators in limits.items():
        for name, (launches, elements) in operators.items():
            found = sites(kind)[f"{name}, m=4"]
            assert len(found) <= launches, (kind, name)
            assert moved(found) / unit <= elements, (kind, name, moved(found) / unit)


def test_bytes_and_launches_of_lazy_steps():
    """Of three sites, the first of which has a step's backward; only the last writes n streams."""
    found, unit = sites("lazy, n = 4, bfloat16"), T * C * 2
    forward = [found[f"lazy step, m=4, {older} older"] for older in range(3)]
    backward = [found[f"lazy step backward, m=4, {older} older"] for older in (1, 2)]
    backward.append(sites("paper, n = 4, bfloat16")["step backward, m=4"])
    assert [len(one) for one in (*forward, *backward)] == [2, 2, 2, 3, 3, 3]
    assert sum(map(moved, forward)) / unit / 3 <= 8.8
    assert sum(map(moved, backward)) / unit / 3 <= 18.5


@pytest.mark.parametrize(
    "kind", [one for one in KINDS if one.startswith(("paper, n = 4, b", "single", "lazy, n = 4, b"))]
)
def test_the_number_of_tokens_makes_no_other_kernel(kind):
    """A last batch, or the first token of `generate`, compiles nothing in the middle of a run."""
    keys = {t: [key_of(one) for launches in sites(kind, t).values() for one in launches] for t in (1, 2, 16, 63, 4096)}
    assert len({tuple(found) for found in keys.values()}) == 1
