"""The Triton kernels from outside: what is rejected, where they run, how their work is cut.

Their numbers are compared in `tests/cuda`, which also runs in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton

from mhc_compile.errors import OptionError, ShapeError
from mhc_compile.ops import triton as kernels
from mhc_compile.ops.triton import configs, coverage
from mhc_compile.ops.triton.launch import COMPILING, launch, noted

CUDA = torch.device("cuda", 0)


def site(n=4, width=8, tokens=3, dtype=torch.float32, device="cpu"):
    def make(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    columns = 2 * n + n * n
    mix = (make(tokens, n, width, dtype=dtype), make(tokens, width, dtype=dtype), make(tokens, n), make(tokens, n, n))
    return mix, (make(n * width, columns), make(columns), make(3))


def test_rejected_inputs_restate_shape_and_dtype():
    mix, parameters = site()
    with pytest.raises(ShapeError, match=r"streams \[3, 4, 8\] float64.*expected float32"):
        kernels.update(mix[0].double(), *mix[1:])
    with pytest.raises(ShapeError, match=r"n = 9.*1 <= n <= 8"):
        kernels.read(torch.zeros(2, 1, 8), *parameters, 9, "sinkhorn", 20, 1e-6)
    with pytest.raises(OptionError, match=r"'identity;rank=3' has no kernel"):
        kernels.read(mix[0], *parameters, 4, "identity;rank=3", 20, 1e-6)


@pytest.fixture
def device(monkeypatch):
    """A machine with a GPU, as far as `reason` asks."""
    coverage.reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    coverage.reason.cache_clear()


def test_where_the_kernels_run(device):
    assert kernels.reason(CUDA) is None


def test_an_old_gpu_has_no_kernels(device):
    device.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels.reason(CUDA) == "compute capability 7.5 is older than 8.0 (Ampere)"


def test_rocm_has_no_kernels(device):
    device.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in kernels.reason(CUDA)


def test_every_channel_of_every_tile_belongs_to_one_program():
    for tokens, width, block in itertools.product((0, 1, 64, 1000, 4096), (8, 70, 2560, 7168), (16, 32, 64)):
        work = configs.cut(tokens, width, 64, block, 4)
        covered = [part * work.each for part in range(work.parts)]
        assert work.tiles * 64 >= tokens
        assert work.parts * work.each * block >= width
        assert all(start * block < width for start in covered), (tokens, width, block, work)
        assert 0 <= work.lag <= work.tiles


def test_many_programs_share_few_tokens():
    assert configs.cut(64, 2560, 64, 32, 4).parts == 80
    assert configs.cut(4096, 2560, 64, 32, 4).parts == 10


def test_launches_are_noted_on_tensors_without_memory():
    mix, parameters = site(width=2560, tokens=4096, dtype=torch.bfloat16, device="meta")
    with noted() as launches:
        new, h, *_ = kernels.step(*mix, *parameters, "sinkhorn", 20, 1e-6)
    names = [one.kernel.__name__ if hasattr(one.kernel, "__name__") else str(one.kernel) for one in launches]
    assert len(launches) == 2, names
    assert new.shape == mix[0].shape
    assert h.shape == mix[1].shape
    assert new.is_meta


def test_other_threads_run_while_one_notes():
    """A model may be traced while the backward of another runs."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter: TRITON_INTERPRET=1 before Triton is imported")
    mix, _ = site(dtype=torch.float32)
    for tensor in mix:
        tensor.fill_(0.5)
    found = []
    thread = threading.Thread(target=lambda: found.append(kernels.update(*mix)))
    with noted() as launches:
        thread.start()
        thread.join()
    assert not launches
    assert torch.equal(found[0], torch.full_like(mix[0], 4 * 0.5 * 0.5 + 0.5 * 0.5))


def test_a_launch_waits_for_the_threads_that_compile():
    """And it runs on its tensors: zeros, here."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: done.wait(0.2) or done.set())
    COMPILING.append(thread)
    thread.start()
    from mhc_compile.ops.triton.blocks import prepare_kernel

    counters, phi = torch.ones(5, dtype=torch.int32), torch.zeros(1)
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs the interpreter: TRITON_INTERPRET=1 before Triton is imported")
    launch(
        prepare_kernel, (1,), counters, phi, phi, 4, 0, *[phi] * 6, 0,
        columns=1, stride=1, packs=False, n=1, m=1, older=0, block=16,
    )  # fmt: skip
    assert done.is_set()
    assert counters.tolist() == [0, 0, 0, 0, 1]
    assert not COMPILING


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    coverage.available.cache_clear()
    coverage.reason.cache_clear()
    try:
        assert "not installed" in kernels.reason(CUDA)
        assert not kernels.takes(torch.float32)
    finally:
        monkeypatch.undo()
        coverage.available.cache_clear()
        coverage.reason.cache_clear()
    assert "triton" in sys.modules
