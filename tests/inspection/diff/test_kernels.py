"""What is read from the code that Inductor writes."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Decoder, tokens

import mhc_compile
import mhc_compile.errors
from mhc_compile.inspection.diff.kernels import Kernel, KernelDiff, read_kernels

CODE = """
cpp_fused_add_native_layer_norm_0 = async_compile.cpp_pybinding(['const float*'], r\'\'\'extern "C" void kernel() {}\'\'\')

class Runner:
    def call(self, args):
        primals_1, tangents_1 = args
        args.clear()
        buf0 = empty_strided_cpu((2, 8), (8, 1), torch.float32)
        cpp_fused_add_native_layer_norm_0(primals_1, buf0)
        # Topologically Sorted Source Nodes: [x, linear], Original ATen: [aten.view, aten.addmm]
        extern_kernels.addmm(primals_1, buf0, tangents_1, alpha=1, beta=1, out=buf1)
        # Topologically Sorted Source Nodes: [mhc_step], Original ATen: [mhc.step]
        buf2 = torch.ops.mhc.step.default(buf1, primals_1)
        buf3 = buf2[0]
        # Topologically Sorted Source Nodes: [mhc_lazy_step], Original ATen: [mhc.lazy_step]
        buf4 = mhc_lazy_step_0c6f8fc0(buf1, buf5, 16, mhc_threads(16), 1e-06)
        assert_size_stride(buf3, (2, 6, 24), (144, 24, 1), 'torch.ops.mhc.step.default')
        return (buf3, )

def benchmark_compiled_module():
    cpp_fused_add_native_layer_norm_0(buf, buf)
"""


def test_launches_are_in_order_with_their_operations():
    assert list(read_kernels(CODE)) == [
        Kernel("backward", "fused", "cpp_fused_add_native_layer_norm", ("add", "native_layer_norm"), ()),
        Kernel("backward", "library", "extern_kernels.addmm", ("aten.view", "aten.addmm"), ("x", "linear")),
        Kernel("backward", "mhc", "mhc.step", ("mhc.step",), ("mhc_step",)),
        Kernel("backward", "mhc", "mhc.lazy_step", ("mhc.lazy_step",), ("mhc_lazy_step",)),
    ]
    (first, *_) = read_kernels(CODE.replace("tangents_1", "primals_2"))
    assert first.phase == "forward"
    assert list(read_kernels("x = 1")) == []


def test_counts():
    plain = tuple(read_kernels(CODE))[:2]
    diff = KernelDiff("Model", plain, tuple(read_kernels(CODE)))
    assert diff.counts("backward") == {"fused": (1, 1), "library": (1, 1), "mhc": (0, 2)}
    assert diff.counts("forward") == {"fused": (0, 0), "library": (0, 0), "mhc": (0, 0)}
    assert diff.to_dict()["counts"]["backward"]["mhc"] == [0, 2]


def test_model_that_does_not_compile_is_rejected():
    from mhc_compile.inspection.diff.kernels import kernels

    with pytest.raises(
        mhc_compile.errors.OptionError, match="option 'inner_backend' is 'eager'; kernels are those of 'inductor'"
    ):
        kernels(Decoder(), tokens(), options={"inner_backend": "eager"})
    with torch.device("meta"):
        model = Decoder()
    with pytest.raises(mhc_compile.errors.CaptureError, match="Decoder is on the meta device"):
        kernels(model, tokens())
