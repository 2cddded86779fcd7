"""torch's structured trace (`TORCH_TRACE`, read by `tlparse`), and the loggers of its compiler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch._logging import trace_structured  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Callable


def trace_artifact(name: str, text: Callable[[], str], *, encoding: str = "string") -> None:
    """Write an artifact to torch's structured trace. `text` is called only if a trace is written.

    `encoding` is "string", or "json" for a content that `tlparse` formats.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=text,
        expect_trace_id=False,  # passes also run outside Dynamo, on exported programs
    )


def show_compiler_errors_only(*, inductor: bool = False) -> None:
    """Silence warnings of Dynamo, or of Inductor, that a command reports itself."""
    logging.getLogger("torch._inductor" if inductor else "torch._dynamo").setLevel(logging.ERROR)
