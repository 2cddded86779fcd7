"""Shapes in letters, and the sizes that make them fit: "n(n+2) nC" and [24, 256] give n = 4, nC = 256."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.config.coefficient_spec import MAX_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["shape_of", "show", "solve"]


def solve(pairs: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int] | None:
    """The sizes of all letters, with which every shape is the one in letters beside it; None if there are none."""
    pairs = list(pairs)
    for n in range(1, MAX_STREAMS + 1):
        sizes = {"n": n, "n(n+2)": n * (n + 2), "2n": 2 * n}
        if all(_fits(letters.split(), shape, sizes) for letters, shape in pairs) and sizes.get("nC", 0) % n == 0:
            return sizes
    return None


def _fits(axes: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether `shape` is that of `axes`; a letter that is met for the first time gets its size."""
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        if axis == "r+n":
            axis, size = "r", size - sizes["n"]
        if size < 1 or (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)) != size:
            return False
    return True


def shape_of(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of `letters` with these sizes."""
    return tuple(
        int(axis) if axis.isdigit() else sum(sizes[term] for term in axis.split("+")) if axis == "r+n" else sizes[axis]
        for axis in letters.split()
    )


def show(letters: str) -> str:
    """Letters as messages write them: [n(n+2), n C]."""
    return f"[{', '.join('n C' if axis == 'nC' else axis for axis in letters.split())}]"
