"""The Python frame whose graph is compiled, and the calls around it, read once for each graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import IN_PLACE

if TYPE_CHECKING:
    from types import CodeType


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a module around the frame, and whether `torch.compile` was entered before it."""

    module: nn.Module
    inside_compile: bool


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame and the Python stack around it. Valid while Dynamo traces the frame.

    Attributes:
        root: the module whose method is traced; None for functions and rests after graph breaks.
        code: the code object of the frame.
        ends_at_break: whether a graph break follows the graph.
        is_part: whether a graph break comes before or after the graph.
        calls: the module calls around the frame, innermost first.
        ddp: the `DistributedDataParallel` whose forward surrounds the frame or is the frame.
        pipeline_stage: index and number of pipeline stages; None outside pipelines.
    """

    root: nn.Module | None
    code: CodeType
    ends_at_break: bool
    is_part: bool
    calls: tuple[ModuleCall, ...] = ()
    ddp: DistributedDataParallel | None = None
    pipeline_stage: tuple[int, int] | None = None

    @property
    def location(self) -> str:
        """Return "file:line" of the code."""
        return f"{self.code.co_filename}:{self.code.co_firstlineno}"

    @property
    def is_whole_model(self) -> bool:
        """Whether the frame is a call of a planned model, whose streams do not leave it."""
        in_place = self.root.__dict__.get(IN_PLACE) if self.root is not None else None
        return in_place is not None and in_place.whole and not self.is_part

    def runs_inside_another(self, module: nn.Module, *, compiled_alone: bool = False) -> bool:
        """Return True if a call of a module that contains `module` surrounds the frame.

        The call counts inside `torch.compile`. With `compiled_alone` it also counts outside, except
        for wrappers of nothing but `module`, such as DDP: `module` is then compiled by itself.
        """
        return any(
            (call.inside_compile or (compiled_alone and not _only_wraps(call.module, module)))
            and call.module is not module
            and any(one is module for one in call.module.modules())
            for call in self.calls
        )

    def caller_of(self, module: nn.Module) -> nn.Module | None:
        """Return the outermost module that contains `module` and whose call surrounds the frame."""
        around = (call.module for call in reversed(self.calls) if call.module is not module)
        return next((one for one in around if any(each is module for each in one.modules())), None)


def read_frame() -> Frame:
    """Read the frame that Dynamo is tracing and the stack around it."""
    running = _torch.running_objects()
    owners = [_torch.frame_self(), *(owner for owner, _ in running)]
    stages = (_torch.pipeline_stage(owner) for owner in owners)
    return Frame(
        root=_torch.root_module(),
        code=_torch.frame_code(),
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
