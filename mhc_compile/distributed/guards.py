"""Checks for distributed training that would miss hyper-connections.

DDP and FSDP collect parameters when they wrap a model. Parameters attached later would follow each
rank's own gradients, and the ranks would silently diverge; DDP can learn of them in most cases
(`late_parameters`). So would those of a trunk sharded along its tokens (sequence parallel), where
each rank has the gradient of its own tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.distributed.late_parameters import explain, has_late
from mhc_compile.errors import AttachError, warn
from mhc_compile.passes.analysis.op_info import tensor_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from mhc_compile.capture.frame import Frame
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes import Site

_WAY_OUT = (
    "Call mhc_compile.attach(model, inputs) first, in the same way on every rank, and wrap the model then; for an"
    " unmodified script, `mhc run --plan mhc.json` (made by `mhc plan`) does so"
)


def check_frame(frame: Frame) -> None:
    """Raise AttachError if the frame runs inside FSDP1, which computes with flat parameters."""
    owner = next((call.module for call in frame.calls if isinstance(call.module, FullyShardedDataParallel)), None)
    if owner is not None:
        raise AttachError(
            f"{type(unwrap(owner.module)).__name__} is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters"
            " hide what belongs to a branch. Shard it with torch.distributed.fsdp.fully_shard (FSDP2), after"
            " mhc_compile.attach(model, inputs), or compile it with another backend"
        )


def check_site(
    site: Site, owner: nn.Module, connection: HyperConnection | None, wrappers: Iterable[DistributedDataParallel]
) -> None:
    """Check that distributed wrappers handle the parameters of a site, before any are created.

    `wrappers` are around the owner.

    Raises:
        AttachError: DDP or FSDP wrapped the model before the hyper-connection existed and cannot
            learn of it, or the trunk is sharded over ranks.
    """
    placements = _share(site)
    if placements is not None:
        raise AttachError(
            f"{site}: the sum is distributed over ranks with placements {placements}; expected a plain tensor that is"
            " whole on every rank, because the gradients of a hyper-connection are not added up over shares of the"
            " tokens. Leave sequence parallelism off (tensor parallelism that ends every branch in RowwiseParallel()"
            " works), or compile this model with another backend"
        )
    for ddp in wrappers:
        obstacle = _torch.obstacle_to_late_parameters(ddp)
        if obstacle is not None and (connection is None or has_late([connection], ddp)):
            raise AttachError(f"{site}: {explain(obstacle)}. {_WAY_OUT}")
    if connection is None and _torch.is_sharded(owner):
        raise AttachError(
            f"{site}: FSDP sharded the {_torch.plain_class(owner).__name__} before its hyper-connections were attached, and would"
            f" neither shard them nor reduce their gradients. {_WAY_OUT}"
        )


def _share(site: Site) -> tuple[Any, ...] | None:
    """Return the placements if the sum or a term is sharded, None if every rank has all of it."""
    todo = [site.add, *site.branch_outputs]
    seen = set(todo)
    while todo:
        node = todo.pop()
        placements = _torch.placements(tensor_value(node))
        if placements is not None:
            if node in (site.add, *site.branch_outputs) or not all(
                placement.is_replicate() for placement in placements
            ):
                return placements
            continue  # a replicated value may be computed from shards
        news = [operand for operand in node.all_input_nodes if operand in site.branch and operand not in seen]
        seen.update(news)
        todo += news
    return None


def check_unwrapped(model: nn.Module) -> None:
    """Raise AttachError, with the module's path, if DDP or FSDP has already wrapped the model."""
    for path, module in model.named_modules():
        ddp = isinstance(module, DistributedDataParallel)
        if ddp or _torch.is_sharded(module):
            where = f"its module {path!r}" if path else "it"
            wrapper = "wrapped in DistributedDataParallel" if ddp else "sharded by FSDP"
            raise AttachError(
                f"mhc_compile.attach cannot attach to {type(model).__name__}: {where} is {wrapper} already, which knows"
                f" only the parameters that it found then. {_WAY_OUT}"
            )


def warn_of_pipeline(frame: Frame) -> None:
    """Warn that streams end with a pipeline stage, if the model is one of several."""
    if frame.pipeline_stage is not None:
        index, count = frame.pipeline_stage
        warn(
            f"pipeline stage {index} of {count}: the next stage receives one tensor, so the streams are averaged where"
            " this stage ends and start again in the next one. That is another model than the unpipelined one as soon"
            " as the streams differ; train and evaluate it with the same stages"
        )
