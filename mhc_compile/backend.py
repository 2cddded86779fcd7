"""`torch.compile(model, backend="mhc")`: the entry point that PyTorch finds by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.compilation.pipeline import compile_captured
from mhc_compile.compilation.run_settings import default_options
from mhc_compile.config.options import Options
from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import fx

    mhc: Callable[..., Callable[..., Any]]


def _mhc(
    graph_module: fx.GraphModule,
    inputs: list[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured, with residual adds rewritten to hyper-connections.

    Use it by name: `torch.compile(model, backend="mhc", options={...}, mode=...)`. The first graph
    of a model has no hyper-connections: they are attached to its modules, and Dynamo traces the
    frame again. Their parameters are then graph inputs, the residual adds become operations on
    streams, and the inner compiler compiles the result.

    Args:
        graph_module: the graph that Dynamo captured.
        inputs: its example inputs.
        options: see `mhc_compile.Options`.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).

    Returns:
        The compiled graph.

    Raises:
        OptionError, AttachError, NothingRewrittenError, RewriteError: without Dynamo's wrapper.
    """
    try:
        if not _torch.in_trace():
            raise MhcError(
                "the mhc backend was called outside torch.compile; for a graph module of your own use"
                " mhc_compile.rewrite(graph_module, ...)"
            )
        if default_options and not isinstance(options, Options):
            options = {**default_options, **(options or {})}
        return compile_captured(graph_module, inputs, Options.parse(options), mode)
    except MhcError as error:
        _torch.raise_through_dynamo(error)
        raise


_mhc.__name__ = _mhc.__qualname__ = "mhc"
#: Under DDP this backend gets whole graphs and splits its result (`rewrite_before_ddp_splits`).
_mhc.takes_whole_graphs = True  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Return the backend. Torch is patched for it at the first access, not on import."""
    if name == "mhc":
        _torch.rewrite_before_ddp_splits()
        return _mhc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
