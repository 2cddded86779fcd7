"""The shapes that parameters have in a layout, and the number of streams that shapes tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.options import MAX_STREAMS

if TYPE_CHECKING:
    from mhc_compile.interop.layout import Kind, Layout

__all__ = ["formula", "logits", "shape_of", "streams_of"]


def logits(layout: Layout, streams: int, *, read_out: bool) -> int:
    """K of a site, or of a read-out, of n streams."""
    return streams if read_out else layout.columns(streams)


def streams_of(layout: Layout, projection: tuple[int, ...], *, read_out: bool, native: bool) -> int | None:
    """n, for fn [K, n C] if `native`, else for phi [n C, K]; None if no number of streams gives this shape."""
    if len(projection) != 2:
        return None
    columns, rows = projection if native else projection[::-1]
    for n in range(1, MAX_STREAMS + 1):
        if logits(layout, n, read_out=read_out) == columns:
            return n if rows and rows % n == 0 else None
    return None


def shape_of(
    layout: Layout, kind: Kind, streams: int, projection: tuple[int, ...], *, read_out: bool, native: bool
) -> tuple[int, ...]:
    """The shape of a parameter of this kind.

    Args:
        layout: whose.
        kind: of the parameter.
        streams: n.
        projection: [K, n C] or [n C, K], in either layout.
        read_out: whether it is one of a read-out.
        native: whether in the native layout, else in ours.
    """
    k = logits(layout, streams, read_out=read_out)
    rows = projection[0] if projection[1] == k else projection[1]
    scales = 1 if read_out else 3 if layout.mixes or not native else 2
    return {
        "projection": (k, rows) if native else (rows, k),
        "logits": (k,),
        "scales": (scales,),
        "same": projection,
    }[kind]


def formula(layout: Layout, kind: Kind, *, read_out: bool, native: bool) -> str:
    """That shape in letters, for messages."""
    k = "n" if read_out else "n(n+2)" if layout.mixes else "2n"
    scales = "1" if read_out else "3" if layout.mixes or not native else "2"
    projection = f"[{k}, n C]" if native else f"[n C, {k}]"
    return {"projection": projection, "logits": f"[{k}]", "scales": f"[{scales}]", "same": projection}[kind]
