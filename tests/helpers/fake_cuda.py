"""What Inductor generates for CUDA, on a machine without a GPU and with a torch without CUDA.

Parameters and inputs are fake tensors on "cuda". Else everything is as on a GPU, from
`torch.compile` to the sources of the kernels of forward and backward. Nothing runs.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import ExternKernelOut, FallbackKernel
from torch._inductor.runtime import triton_helpers
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common as amp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget

from mhc_compile._torch.inductor import load_cpp
from mhc_compile.ops.triton import ahead, coverage

#: What Inductor asks of an H100.
_H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block_optin=232448,
)  # fmt: skip
#: Autograd asks for the accelerator and its current stream. A torch without CUDA has made its
#: answer to the first question before anything can be registered, so it is replaced in its place.
_STREAMS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <new>
namespace {
using c10::Device, c10::Stream;
const Device device(c10::DeviceType::CUDA, 0);
struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
const auto* hooks = new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}
extern "C" const void* kernel() { return hooks; }
"""
_SOURCE = re.compile(
    r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.DOTALL | re.MULTILINE
)
_LAUNCH = re.compile(r"^ +(triton_\w+)\.run\(", re.MULTILINE)
_CALL = re.compile(r"^ +\w+ = torch\.ops\.mhc\.(\w+)\.default\(", re.MULTILINE)


@dataclass(frozen=True)
class Generated:
    """What Inductor generates of one graph.

    Attributes:
        sources: of its own kernels, by name.
        launches: the names of its own kernels, once for every launch.
        moved: bytes that these read and write.
        calls: the operators of this package that it calls, in order.
        strided: those of them with an input that is not contiguous, which they copy.
        products: the dtypes of results of matrix products.
    """

    sources: dict[str, str]
    launches: list[str]
    moved: int
    calls: list[str]
    strided: list[str]
    products: list[torch.dtype]


class NothingRunsError(Exception):
    """Raised in the place of the generated code."""


class _OnCPU(TorchDispatchMode):
    """Makes tensors on CPU, whatever device they are wanted on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


def _generated(graph: GraphLowering) -> Generated:
    code = graph.codegen()[0].value
    externs = [node.node for node in graph.scheduler.nodes if isinstance(node, ExternKernelSchedulerNode)]
    kernels = [
        node for node in graph.scheduler.nodes
        if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode))
    ]  # fmt: skip
    calls = [node for node in externs if isinstance(node, FallbackKernel) and node.op_overload.namespace == "mhc"]
    return Generated(
        sources=dict(_SOURCE.findall(code)),
        launches=_LAUNCH.findall(code),
        moved=sum(int(node.get_read_write_buffers_sizes()) for node in kernels),
        calls=_CALL.findall(code),
        strided=[
            node.op_overload.overloadpacket.__name__ for node in calls
            if not all(one.get_layout().is_contiguous() for one in node.inputs)
        ],
        products=[
            node.get_dtype() for node in externs
            if isinstance(node, ExternKernelOut) and node.get_kernel_name() in ("extern_kernels.mm", "extern_kernels.bmm")
        ],
    )  # fmt: skip


@contextlib.contextmanager
def fake_cuda():
    """In this context torch.compile finds a GPU. The list gets what is generated of every graph.

    Autograd has streams for CUDA to the end of the process.
    """
    load_cpp(_STREAMS)
    found: list[Generated] = []

    def compile_to_module(graph):
        found.append(_generated(graph))
        graph.cache_path = None
        return SimpleNamespace(call=call)

    def call(_):
        raise NothingRunsError

    def fold(folder):
        # Constants are computed with tensors of one element, which are real.
        with _OnCPU():
            return fold_on_device(folder)

    fold_on_device = UniformValueConstantFolder.run
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    patches = {
        torch.cuda: {
            "get_device_capability": lambda *_: (9, 0),
            "is_bf16_supported": lambda **_: True,
            "_exchange_device": lambda *_: 0,
        },
        amp: {"amp_definitely_not_available": lambda: False},
        CudaInterface: {
            "is_available": staticmethod(lambda: True),
            "is_bf16_supported": staticmethod(lambda **_: True),
            "get_device_properties": staticmethod(lambda *_: _H100),
        },
        CudaInterface.Worker: {"get_device_properties": staticmethod(lambda *_: _H100)},
        triton.runtime.driver: {"_active": target},
        triton_helpers: {"set_driver_to_gpu": lambda: None},
        UniformValueConstantFolder: {"run": fold},
        GraphLowering: {"compile_to_module": compile_to_module},
        # Kernels of this package would be compiled in threads, to be called by nothing.
        ahead: {"prepare": lambda *_: None},
    }
    with contextlib.ExitStack() as stack:
        for answer in (has_triton, coverage.reason):
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        for owner, attributes in patches.items():
            stack.enter_context(mock.patch.multiple(owner, **attributes))
        # The backward is compiled with the forward, which does not run.
        stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        settings = {"fx_graph_cache": False, "compile_threads": 1, "use_static_triton_launcher": False}
        stack.enter_context(inductor_config.patch(settings))
        yield found


def _on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_like(tensor, device="cuda")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def generate(
    model: nn.Module, x: torch.Tensor, *, backend: str, options=None, autocast: torch.dtype | None = None
) -> list[Generated]:
    """Compile a model for an input like `x` on CUDA. Its parameters are fake from now on."""
    with fake_cuda() as found:
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = _on_cuda(x)
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: _on_cuda(one) for name, one in tensors.items() if one is not None})
        # The mode is left: under one, models with hyper-connections run operation by operation.
        amp_mode = torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext()
        with contextlib.suppress(NothingRunsError), amp_mode:
            torch.compile(model, backend=backend, options=options, fullgraph=True)(x)
    return found


@functools.cache
def shared_memory(name: str, source: str) -> int:
    """Compile a kernel of Inductor for sm_90 with every configuration that it would try.

    Return the most bytes of shared memory that one takes.
    """
    with fake_cuda():
        tuner = getattr(PyCodeCache.load(source), name)
        return max(tuner._precompile_config(config).kernel.metadata.shared for config in tuner.configs)
