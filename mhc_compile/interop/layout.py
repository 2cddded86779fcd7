"""What a layout is: how the files of one system name and shape the parameters of hyper-connections, as one value. Torch is not imported here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["READ_OUT", "Entry", "Found", "Kind", "Layout", "Part", "Spelling"]

#: The submodule of a chain's last hyper-connection that holds a learned read-out.
READ_OUT = "read_out"

#: What a parameter is, and so how it is turned round: a matrix that is transposed, a vector of logits, scales, or what is the same on both sides.
Kind = Literal["projection", "logits", "scales", "same"]


@dataclass(frozen=True)
class Part:
    """A native parameter.

    Attributes:
        name: below the template of its spelling.
        shape: in letters, axes with a blank between them: n streams, nC features of all of them, r a rank, sums and numbers ("n(n+2) nC").
    """

    name: str
    shape: str


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, and what it is made of there.

    Attributes:
        ours: its name here.
        shape: its shape here, in letters.
        native: the native parameter; of several, the projections whose outputs stand one behind the other in ours.
        kind: what it is.
    """

    ours: str
    shape: str
    native: tuple[Part, ...]
    kind: Kind


@dataclass(frozen=True)
class Found:
    """What a native name says: the module that owns the site, the site's template ("" for a read-out), and the native parameter."""

    owner: str
    site: str
    part: str


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The names in one kind of file.

    Attributes:
        name: "transformers" for what the `state_dict` of the module in transformers has, "saved" for what its `save_pretrained` writes, "published"
            for the files of the system's makers, where those are others still.
        sites: template of a parameter's name below the module that owns the site, and the branches that it may stand for, in the order of the
            sites in a block: {"attn_hc.{}": ("self_attn",), "ffn_hc.{}": ("mlp",)}.
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
        site: the parameters of a site.
        read_out: the parameters of a read-out, none if the system's has none.
        spellings: the kinds of files, the one with the names of transformers first.
        transposed: the system applies its matrix transposed, H_res = combᵀ, so that the residual logit (i, j) here is (j, i) there.
    """

    preset: str
    source: str
    site: tuple[Entry, ...]
    read_out: tuple[Entry, ...] = ()
    spellings: tuple[Spelling, ...]
    transposed: bool = False

    def __hash__(self) -> int:
        return hash(self.preset)

    def spelling(self, name: str) -> Spelling | None:
        """The spelling called `name`."""
        return next((spelling for spelling in self.spellings if spelling.name == name), None)

    def find(self, name: str, spelling: Spelling) -> Found | None:
        """What the native `name` of an entry stands for, None if for nothing of a hyper-connection."""
        table, longest = _suffixes(self, spelling.name)
        parts = name.split(".")
        for length in range(min(len(parts), longest), 0, -1):
            found = table.get(".".join(parts[-length:]))
            if found is not None:
                return Found(".".join(parts[:-length]), *found)
        return None


@functools.lru_cache(maxsize=256)
def _suffixes(layout: Layout, spelling_name: str) -> tuple[dict[str, tuple[str, str]], int]:
    """The ends of names with what they stand for, and how many components the longest has."""
    spelling = layout.spelling(spelling_name)
    assert spelling is not None
    parts = [part.name for entry in layout.site for part in entry.native]
    table = {site.format(part): (site, part) for site in spelling.sites for part in parts}
    if spelling.read_out:
        parts = [part.name for entry in layout.read_out for part in entry.native]
        table |= {spelling.read_out.format(part): ("", part) for part in parts}
    return table, max(suffix.count(".") + 1 for suffix in table)
