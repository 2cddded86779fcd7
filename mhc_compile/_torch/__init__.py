"""Every private name of torch that this package uses, in one place, each with what it is for.

Checked on torch 2.13.0 (CPU). A name that a version of torch lacks fails here, with the version in the message, and nowhere else.
"""

from __future__ import annotations

import torch

try:
    from torch._dynamo.eval_frame import OptimizedModule
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
    from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

    from mhc_compile._torch.distributed import (
        ddp_parameters,
        fsdp_hooks,
        is_sharded,
        pipeline_stage,
        placements,
        rewrite_before_ddp_splits,
        split_as_ddp_would,
        whole_graphs,
    )
    from mhc_compile._torch.dynamo import (
        ends_at_break,
        example_size,
        forget_compiled,
        frame_code,
        frame_location,
        frame_self,
        graph_is_part,
        has_compiled,
        in_trace,
        isolated_compile,
        make_room,
        module_by_id,
        name_input,
        numpy_draws_as_in_eager,
        raise_through_dynamo,
        restart_trace,
        root_module,
        running_objects,
        same_function,
        uncompiled,
    )
    from mhc_compile._torch.flops import flop_counter
    from mhc_compile._torch.inductor import (
        cache_folder,
        compile_with_inductor,
        cpp_compiler,
        inductor_code,
        inductor_settings,
        inner_backend,
        load_cpp,
    )
    from mhc_compile._torch.optim import (
        before_average_update,
        lbfgs_has_memory,
        living_optimizers,
        restart_lbfgs,
    )
except ImportError as error:  # pragma: no cover - depends on the torch that is installed
    raise ImportError(
        f"mhc_compile works with torch 2.11 to 2.13; torch {torch.__version__} lacks what it needs: {error}"
    ) from error

__all__ = [
    "BackendCompilerFailed",
    "OptimizedModule",
    "TensorWeakRef",
    "TorchDynamoException",
    "WeakTensorKeyDictionary",
    "before_average_update",
    "cache_folder",
    "compile_with_inductor",
    "cpp_compiler",
    "ddp_parameters",
    "ends_at_break",
    "example_size",
    "flop_counter",
    "forget_compiled",
    "frame_code",
    "frame_location",
    "frame_self",
    "fsdp_hooks",
    "graph_is_part",
    "has_compiled",
    "in_trace",
    "inductor_code",
    "inductor_settings",
    "inner_backend",
    "is_sharded",
    "isolated_compile",
    "lbfgs_has_memory",
    "living_optimizers",
    "load_cpp",
    "make_room",
    "module_by_id",
    "name_input",
    "numpy_draws_as_in_eager",
    "pipeline_stage",
    "placements",
    "raise_through_dynamo",
    "restart_lbfgs",
    "restart_trace",
    "rewrite_before_ddp_splits",
    "root_module",
    "running_objects",
    "same_function",
    "split_as_ddp_would",
    "uncompiled",
    "whole_graphs",
]
