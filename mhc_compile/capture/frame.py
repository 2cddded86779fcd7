"""The Python frame whose graph is compiled, and the calls around it: read once for each graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import _torch

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["Frame", "ModuleCall", "read_frame"]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a module that surrounds the frame."""

    module: nn.Module
    #: Whether the call came after `torch.compile` was entered.
    inside_compile: bool


@dataclass(frozen=True, eq=False)
class Frame:
    """What a graph's frame and the Python stack around it say. Valid while Dynamo traces the frame.

    Attributes:
        root: the module whose method is traced; None for a function, or where a graph break lost
            it.
        code: the code object of the frame.
        location: "file:line" of the code.
        ends_at_break: whether a graph break follows the graph.
        is_part: whether the graph ends at a graph break, or begins behind one.
        calls: the module calls around the frame, the innermost first.
        ddp: the `DistributedDataParallel` whose forward runs around the frame, or is the frame.
        pipeline_stage: number of the pipeline stage and how many there are; None outside pipelines.
    """

    root: nn.Module | None
    code: CodeType
    location: str
    ends_at_break: bool
    is_part: bool
    calls: tuple[ModuleCall, ...] = ()
    ddp: DistributedDataParallel | None = None
    pipeline_stage: tuple[int, int] | None = None

    def runs_inside_another(self, module: nn.Module, *, compiled_alone: bool = False) -> bool:
        """Return True if the call of a module that holds `module` surrounds the frame, inside `torch.compile`.

        With `compiled_alone` also calls outside `torch.compile` count: `module` is then a part that
        was compiled by itself. Wrappers that hold nothing but `module`, such as DDP, do not count
        there.
        """
        return any(
            (call.inside_compile or (compiled_alone and not _only_wraps(call.module, module)))
            and call.module is not module
            and any(one is module for one in call.module.modules())
            for call in self.calls
        )


def read_frame() -> Frame:
    """Read the frame that Dynamo is tracing and the stack around it."""
    running = _torch.running_objects()
    owners = [_torch.frame_self(), *(owner for owner, _ in running)]
    stages = (_torch.pipeline_stage(owner) for owner in owners)
    return Frame(
        root=_torch.root_module(),
        code=_torch.frame_code(),
        location=_torch.frame_location(),
        ends_at_break=_torch.ends_at_break(),
        is_part=_torch.graph_is_part(),
        calls=tuple(ModuleCall(owner, inside) for owner, inside in running if isinstance(owner, nn.Module)),
        ddp=next((owner for owner in owners if isinstance(owner, DistributedDataParallel)), None),
        pipeline_stage=next((stage for stage in stages if stage is not None), None),
    )


def _only_wraps(owner: nn.Module, module: nn.Module) -> bool:
    while owner is not module:
        children = list(owner.children())
        if len(children) != 1:
            return False
        owner = children[0]
    return True
