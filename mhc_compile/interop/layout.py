"""What a layout is: how the files of one system name and shape the parameters of hyper-connections, as one value. Torch is not imported here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["READ_OUT", "Entry", "Found", "Kind", "Layout", "Spelling"]

#: The name of a chain's read-out among the hyper-connections of the module that owns the chain's last site.
READ_OUT = "read_out"

#: What a parameter is, and so how it is turned round (`mhc_compile.interop.tensors`).
Kind = Literal["projection", "logits", "scales", "same"]


@dataclass(frozen=True)
class Entry:
    """One parameter of a site or of a read-out: its name here, its name there, and what it is."""

    ours: str
    native: str
    kind: Kind


@dataclass(frozen=True)
class Found:
    """What the name of an entry says: the module that owns the site, the site's template ("" for a read-out), and the parameter."""

    owner: str
    site: str
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The names in one kind of file.

    Attributes:
        name: "transformers" for what the `state_dict` of the module in transformers has, "saved" for what its `save_pretrained` writes, "published"
            for the files of the system's makers, where those are others still.
        sites: template of a parameter's name below the module that owns the site, and the branches that it may stand for: {"attn_hc.{}":
            ("self_attn",)}.
        read_out: template of the read-out's parameters below the module that has the blocks; "" if the system has none with parameters.
        alone: names of lists of blocks of which each is a chain of its own, with its own read-out.
    """

    name: str
    sites: Mapping[str, tuple[str, ...]]
    read_out: str = ""
    alone: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one system stores what its preset computes with.

    A new one is one file like its neighbours, and a line in `mhc_compile.interop.layouts`; from outside it is `register_layout(Layout(...))`.

    Attributes:
        preset: whose layout.
        source: where names and shapes are to be found.
        entries: the parameters of a site.
        read_out: the parameters of a read-out, none if the system's has none.
        spellings: the kinds of files, the one with the names of transformers first.
        mixes: whether there are n² residual logits a site; without, H_res = I and there is no third scale.
        transposed: the system applies its matrix transposed, H_res = combᵀ, so that the residual logit (i, j) here is (j, i) there.
    """

    preset: str
    source: str
    entries: tuple[Entry, ...]
    read_out: tuple[Entry, ...] = ()
    spellings: tuple[Spelling, ...]
    mixes: bool = True
    transposed: bool = False

    def columns(self, streams: int) -> int:
        """K, the logits of a site of n streams."""
        return 2 * streams + (streams**2 if self.mixes else 0)

    def spelling(self, name: str) -> Spelling | None:
        """The spelling called `name`."""
        return next((spelling for spelling in self.spellings if spelling.name == name), None)

    def find(self, name: str, spelling: Spelling) -> Found | None:
        """What the native `name` of an entry stands for, None if for nothing of a hyper-connection."""
        table = _suffixes(self, spelling.name)
        parts = name.split(".")
        for length in range(min(len(parts), 4), 0, -1):
            found = table.get(".".join(parts[-length:]))
            if found is not None:
                site, entry = found
                return Found(".".join(parts[:-length]), site, entry)
        return None

    def __hash__(self) -> int:
        return hash(self.preset)


@functools.lru_cache(maxsize=256)
def _suffixes(layout: Layout, spelling_name: str) -> dict[str, tuple[str, Entry]]:
    spelling = layout.spelling(spelling_name)
    assert spelling is not None
    table = {site.format(entry.native): (site, entry) for site in spelling.sites for entry in layout.entries}
    if spelling.read_out:
        table |= {spelling.read_out.format(entry.native): ("", entry) for entry in layout.read_out}
    return table
