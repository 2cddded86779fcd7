"""All private torch names that this package uses; `README.md` lists each with its purpose.

Checked on torch 2.13.0 (CPU). A name that a version of torch lacks fails here, with the version in
the message, and nowhere else.
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
        graph_break,
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
    from mhc_compile._torch.fx import (
        FakeTensorMode,
        checkpoint_context,
        copy_node,
        is_higher_order,
        is_operator,
        is_overload,
        map_tensors,
        new_graph_like,
        operator_name,
        overload_like,
        storage_key,
        tensor_leaves,
        written_arguments,
    )
    from mhc_compile._torch.inductor import (
        cache_folder,
        compile_with_inductor,
        cpp_compiler,
        inductor_code,
        inductor_settings,
        inner_backend,
        load_cpp,
    )
    from mhc_compile._torch.logging import show_compiler_errors_only, trace_artifact
    from mhc_compile._torch.modules import (
        COMPILED_ATTRIBUTE,
        child_module,
        has_compiled_call,
        has_hooks,
        original_module,
        set_state_metadata,
        shallow_copy,
        state_metadata,
        write_count,
    )
    from mhc_compile._torch.optim import (
        before_averaging,
        lbfgs_has_memory,
        living_optimizers,
        restart_lbfgs,
    )
except ImportError as error:  # pragma: no cover - depends on the torch that is installed
    raise ImportError(
        f"mhc_compile works with torch 2.11 to 2.13; torch {torch.__version__} lacks what it needs: {error}"
    ) from error

__all__ = [
    "COMPILED_ATTRIBUTE",
    "BackendCompilerFailed",
    "FakeTensorMode",
    "OptimizedModule",
    "TensorWeakRef",
    "TorchDynamoException",
    "WeakTensorKeyDictionary",
    "before_averaging",
    "cache_folder",
    "checkpoint_context",
    "child_module",
    "compile_with_inductor",
    "copy_node",
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
    "graph_break",
    "graph_is_part",
    "has_compiled",
    "has_compiled_call",
    "has_hooks",
    "in_trace",
    "inductor_code",
    "inductor_settings",
    "inner_backend",
    "is_higher_order",
    "is_operator",
    "is_overload",
    "is_sharded",
    "isolated_compile",
    "lbfgs_has_memory",
    "living_optimizers",
    "load_cpp",
    "make_room",
    "map_tensors",
    "module_by_id",
    "name_input",
    "new_graph_like",
    "numpy_draws_as_in_eager",
    "operator_name",
    "original_module",
    "overload_like",
    "pipeline_stage",
    "placements",
    "raise_through_dynamo",
    "restart_lbfgs",
    "restart_trace",
    "rewrite_before_ddp_splits",
    "root_module",
    "running_objects",
    "same_function",
    "set_state_metadata",
    "shallow_copy",
    "show_compiler_errors_only",
    "split_as_ddp_would",
    "state_metadata",
    "storage_key",
    "tensor_leaves",
    "trace_artifact",
    "uncompiled",
    "whole_graphs",
    "write_count",
    "written_arguments",
]
