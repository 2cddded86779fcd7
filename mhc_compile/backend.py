"""`torch.compile(model, backend="mhc")`: the entry point that PyTorch finds by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.compilation.pipeline import compile_captured
from mhc_compile.config.options import Options
from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import fx

    mhc: Callable[..., Callable[..., Any]]

__all__ = ["mhc"]


def _mhc(
    graph_module: fx.GraphModule,
    inputs: list[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured, its residual adds rewritten into hyper-connections.

    Users name it: `torch.compile(model, backend="mhc", options={...}, mode=...)`. The first graph of a model has no
    hyper-connections: they are attached to its modules, and Dynamo traces the frame again. From then on their
    parameters are inputs of the graph, the residual adds become operations on streams, and the result goes to the
    inner compiler.

    Args:
        graph_module: the graph that Dynamo captured.
        inputs: its example inputs.
        options: see `mhc_compile.Options`.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).

    Returns:
        The compiled graph.

    Raises:
        OptionError, AttachError, NothingRewrittenError: as themselves, through Dynamo.
    """
    try:
        if not _torch.in_trace():
            raise MhcError(
                "the mhc backend was called outside torch.compile; for a graph module of your own use mhc_compile.rewrite(graph_module, ...)"
            )
        return compile_captured(graph_module, inputs, Options.parse(options), mode)
    except MhcError as error:
        _torch.raise_through_dynamo(error)
        raise


_mhc.__name__ = _mhc.__qualname__ = "mhc"
#: Under DDP this backend takes the whole graph and splits its own result (`_torch.rewrite_before_ddp_splits`).
_mhc.takes_whole_graphs = True  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Return the backend. Torch is prepared for it when it is first looked up, by its name or in Python, and not on import."""
    if name == "mhc":
        _torch.rewrite_before_ddp_splits()
        return _mhc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
