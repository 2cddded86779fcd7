"""`Layout`: names and shapes of hyper-connections in the files of one system. Torch-free.

Shapes are written in letters, with a blank between axes: n streams, nC features of all streams
together, r a rank, numbers, and the sums "n(n+2)", "2n" and "r+n". "n(n+2) nC" and [24, 256] give
n = 4, nC = 256.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mhc_compile.config.coefficient_spec import MAX_STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Decides how a parameter is converted: matrices are transposed, residual logits may be, the number
#: of scales may differ, and "same" is copied.
Kind = Literal["projection", "logits", "scales", "same"]


@dataclass(frozen=True)
class Part:
    """A parameter by its name below the template of a spelling, and its shape in letters."""

    name: str
    shape: str


@dataclass(frozen=True)
class Entry:
    """One of our parameters, and the native parameters that it corresponds to.

    Attributes:
        ours: its name in our layout.
        shape: its shape in our layout, in letters.
        native: the native parameters. Several are projections, concatenated in ours.
        kind: decides how it is converted.
    """

    ours: str
    shape: str
    native: tuple[Part, ...]
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The names in one kind of file.

    Attributes:
        name: "transformers" for the `state_dict` of the module in transformers, "saved" for the
            output of its `save_pretrained`, "published" for the original release where it differs.
        sites: template of parameter names below the module that owns the site, and the branches
            that it may stand for, in the order of the sites in a block:
            {"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)}.
        read_out: template of the read-out's parameters below the module that has the blocks; "" if
            the system's read-out has no parameters.
        alone: names of module lists in which every block is a chain with a read-out of its own.
    """

    name: str
    sites: Mapping[str, tuple[str, ...]]
    read_out: str = ""
    alone: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one system stores the parameters of its preset.

    To add one, write it in `layouts.py` and list it there, or call `layouts.register_layout`.

    Attributes:
        preset: name of the preset.
        source: where the names and shapes are defined.
        site: the parameters of a site.
        read_out: the parameters of a read-out, () if it has none.
        spellings: the kinds of files; the names of transformers come first.
        transposed: the system applies its matrix transposed, H_res = combᵀ: our residual logit
            (i, j) is its (j, i).
    """

    preset: str
    source: str
    site: tuple[Entry, ...]
    read_out: tuple[Entry, ...] = ()
    spellings: tuple[Spelling, ...]
    transposed: bool = False

    def find(self, name: str, spelling: Spelling) -> tuple[str, str, str] | None:
        """Parse a native name; None if it is no parameter of a hyper-connection.

        Returns:
            Path of the owning module, template of the site ("" for a read-out), parameter.
        """
        suffixes = self._suffixes[spelling.name]
        parts = name.split(".")
        longest = max(suffix.count(".") for suffix in suffixes) + 1
        for length in range(min(len(parts), longest), 0, -1):
            found = suffixes.get(".".join(parts[-length:]))
            if found is not None:
                return ".".join(parts[:-length]), *found
        return None

    @functools.cached_property
    def _suffixes(self) -> dict[str, dict[str, tuple[str, str]]]:
        """The ends of names by spelling, each with the template of its site and its parameter."""
        site, read_out = ([p.name for e in entries for p in e.native] for entries in (self.site, self.read_out))
        return {
            spelling.name: {template.format(part): (template, part) for template in spelling.sites for part in site}
            | ({spelling.read_out.format(part): ("", part) for part in read_out} if spelling.read_out else {})
            for spelling in self.spellings
        }


def solve(pairs: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int] | None:
    """Return sizes of the letters that match every (letters, shape) pair, or None."""
    pairs = list(pairs)
    for n in range(1, MAX_STREAMS + 1):
        sizes = {"n": n, "n(n+2)": n * (n + 2), "2n": 2 * n}
        if all(_fits(letters.split(), shape, sizes) for letters, shape in pairs) and sizes.get("nC", 0) % n == 0:
            return sizes
    return None


def _fits(axes: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Return whether `shape` matches `axes`; adds the sizes of letters seen for the first time."""
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape, strict=True):
        if axis == "r+n":
            axis, size = "r", size - sizes["n"]
        if size < 1 or (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)) != size:
            return False
    return True


def shape_of(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of `letters` with these sizes."""
    known = {**sizes, **({"r+n": sizes["r"] + sizes["n"]} if "r" in sizes else {})}
    return tuple(int(axis) if axis.isdigit() else known[axis] for axis in letters.split())
