"""What the repository promises about itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.private_torch import private_names

ROOT = Path(__file__).parent.parent


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("python3 -m venv .venv && ")]


def test_ci_runs_exactly_the_readme_s_test_command():
    run, test = commands((ROOT / "README.md").read_text())[:2]
    assert run.endswith("mhc demo")
    assert test.endswith("pytest")
    assert commands((ROOT / ".ci" / "run").read_text()) == [f"{test} || failed=1"]


def test_the_top_level_is_fixed():
    allowed = {"mhc_compile", "passes", "tests", "examples", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - {"build", "runs", "mhc_compile.egg-info"} == allowed


def test_passes_import_no_room_above_them():
    allowed = ("mhc_compile.passes", "mhc_compile._torch", "mhc_compile.ops", "mhc_compile.errors")
    for path in (ROOT / "passes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = (
                    [f"mhc_compile.{alias.name}" for alias in node.names]
                    if node.module == "mhc_compile"
                    else [node.module]
                )
            for module in modules:
                inside = any(module == room or module.startswith(f"{room}.") for room in allowed)
                assert inside or module.split(".")[0] != "mhc_compile", (path.name, node.lineno, module)


#: Private names of torch outside `_torch/`, each with its reason. Entries may only be removed.
PRIVATE_NAMES = {
    # The only way for a module to act on the loading and saving of its own state, hooks aside,
    # which pickling would have to restore.
    ("mhc_compile/modules/state_dict.py", "_load_from_state_dict"),
    ("mhc_compile/modules/hyper_connection.py", "_save_to_state_dict"),
}


def product_files() -> list[Path]:
    """The Python files of the package, passes included, `_torch` excluded."""
    rooms = (*(ROOT / "mhc_compile").iterdir(), ROOT / "passes")
    files = [file for room in rooms for file in ([room] if room.suffix == ".py" else room.rglob("*.py"))]
    return [
        file
        for file in files
        if {"_torch"}.isdisjoint(file.relative_to(ROOT).parts) and "mhc_compile/passes" not in str(file)
    ]


def test_private_names_of_torch_live_in_one_room():
    found = {
        (str(file.relative_to(ROOT)), use.name): use.line
        for file in product_files()
        for use in private_names(file.read_text())
    }
    assert not [(*key, line) for key, line in found.items() if key not in PRIVATE_NAMES]
    assert not PRIVATE_NAMES - found.keys(), "no longer used: remove from the list"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.utils import _pytree as tree", ["torch.utils._pytree"]),
        ("def f():\n    from torch._inductor import config", ["torch._inductor.config"]),
        ("import torch\ntorch._dynamo.reset()", ["torch._dynamo"]),
        ("import torch as t\nt.ops.aten._softmax", ["torch.ops.aten._softmax"]),
        ("from torch import nn\nnn.modules.conv._ConvNd", ["torch.nn.modules.conv._ConvNd"]),
        ("def f(graph):\n    return graph._codegen", ["_codegen"]),
        ("def f(model):\n    return model._modules['mhc']", ["_modules"]),
        ("def f(node):\n    return hasattr(node, '_dynamo_source')", ["_dynamo_source"]),
        ("def f(module):\n    return getattr(module, '_forward_hooks')", ["_forward_hooks"]),
        ("import importlib\nimportlib.import_module('torch._C')", ["torch._C"]),
        ("import sys\nsys.modules['torch.distributed._tensor']", ["torch.distributed._tensor"]),
        ("from torch import nn\nclass A(nn.Module):\n    def _apply(self, f): ...", ["_apply"]),
        ("from torch import nn\nclass A(nn.Module):\n    def f(self):\n        return self._buffers", ["_buffers"]),
        ("from mhc_compile._torch import OptimizedModule\nOptimizedModule._hidden", ["OptimizedModule._hidden"]),
        ("import torch\nx = torch.ops.aten.add.Tensor", []),
        ("class A:\n    def f(self):\n        return self._modules()", []),
        ("from mhc_compile import _torch\n_torch.original_module(m)", []),
        ("from mhc_compile.ops import _files\n_files()", []),
        ('"""About `torch._dynamo` in prose."""', []),
    ],
)
def test_the_guard_sees_private_names(source, names):
    assert [use.name for use in private_names(source)] == names


#: Every function that patches torch.
PATCHES = """
    rewrite_before_ddp_splits register_decompositions register_extern inductor_code observe_graphs make_room restart_trace uncompiled
    living_optimizers before_averaging patch_compile
    on_new_class on_construction before_loading after_saving after_saving_safetensors
    after_saving_distributed on_backward
    observe_distributed_loads before_adding_group before_backward before_loading_state
    rewrite_for_other_compilers after_compiling_in_place after_exporting guard_on_forward_pre_hooks
"""


def test_every_private_name_and_patch_is_in_the_table():
    room = ROOT / "mhc_compile" / "_torch"
    table = (room / "README.md").read_text()
    names = {use.name for file in room.glob("*.py") for use in private_names(file.read_text())}
    assert not sorted(name for name in names if not re.search(rf"{re.escape(name)}\b", table))
    listed = re.findall(r"^\| `(\w+)\.(\w+)` \|", table.partition("## Patches")[2], re.MULTILINE)
    assert {function for _, function in listed} == set(PATCHES.split())
    assert all(f"def {function}(" in (room / f"{module}.py").read_text() for module, function in listed)


def test_importing_the_rooms_patches_nothing():
    code = """
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.optim.swa_utils import AveragedModel
import torch
before = (DDPOptimizer.compile_fn, AveragedModel.update_parameters, torch.compile)
import mhc_compile._torch, mhc_compile.passes, mhc_compile.attachment.averaged_model, mhc_compile.attachment.sites, mhc_compile.backend
assert before == (DDPOptimizer.compile_fn, AveragedModel.update_parameters, torch.compile)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_in_the_wheel_s_list():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = [
        path.parent.relative_to(ROOT)
        for room in ("mhc_compile", "passes")
        for path in (ROOT / room).rglob("__init__.py")
    ]
    found = {".".join(path.parts) for path in packages if path.parts[:2] != ("mhc_compile", "passes")}
    assert {f"mhc_compile.{name}" if name.startswith("passes") else name for name in found} == listed
