"""From native names and shapes to the plan that brings them into our layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.checkpoints.load import plain_name
from mhc_compile.errors import CheckpointError
from mhc_compile.interop.entries import changes_from_native
from mhc_compile.interop.layout import READ_OUT
from mhc_compile.interop.layouts import LAYOUTS, get_layout
from mhc_compile.interop.paths import connection_path, join, last
from mhc_compile.interop.plan import Change, Plan, plan

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mhc_compile.interop.layout import Found, Layout, Spelling

__all__ = ["fitting", "plan_from_native"]


def plan_from_native(
    shapes: Mapping[str, tuple[int, ...]],
    preset: str,
    *,
    branches: Mapping[str, str] | None = None,
    expected: Collection[str] = (),
) -> Plan:
    """How a native state dict comes into our layout.

    Args:
        shapes: names and shapes of its entries. Names may have the `_orig_mod.` of `torch.compile`.
        preset: the system that it is of.
        branches: for models whose branches have other names than the system's: {"attn": "self_attn"}.
        expected: names of the model's own entries, if there is a model.

    Raises:
        OptionError: no such preset, or one without a layout.
        CheckpointError: names or shapes are not those of the system, entries are missing, or it is not clear what an entry stands for.
    """
    layout = get_layout(preset)
    try:
        return _plan(shapes, layout, branches or {}, frozenset(expected))
    except CheckpointError as error:
        others = [name for name in fitting(shapes) if name != preset]
        if not others:
            raise
        raise CheckpointError(f"{error}. The names and shapes are those of {' or '.join(map(repr, others))}") from None


def fitting(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The presets whose names and shapes these are. It is found out from them alone: files of systems that differ only in numbers look the same."""
    found = []
    for name, layout in LAYOUTS.items():
        try:
            _plan(shapes, layout, {}, frozenset())
        except CheckpointError:
            continue
        found.append(name)
    return found


def _plan(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, branches: Mapping[str, str], expected: Collection[str]
) -> Plan:
    spelling = _spelling(shapes, layout)
    names = {name: plain_name(name) for name in shapes}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, plain in names.items():
        found = layout.find(plain, spelling)
        if found is not None:
            groups.setdefault((found.owner, found.site), {})[found.part] = name
        else:
            _reject_foreign(plain, layout, spelling)
    owners = list(dict.fromkeys(owner for owner, site in groups if site))
    heads = [owner for owner, site in groups if not site]
    if layout.read_out and not heads:
        entry = spelling.read_out.format(layout.read_out[0].native[0].name)
        raise CheckpointError(
            f"preset {layout.preset!r}: there is no read-out (an entry {entry!r}), with which this system ends its chain"
        )
    plain_names = set(names.values())
    changes: list[Change] = []
    for (owner, site), members in groups.items():
        path = (
            connection_path(owner, _branch(owner, site, spelling, branches, expected, plain_names))
            if site
            else _read_out(owner, owners, heads, layout, spelling, branches, expected, plain_names)
        )
        changes += changes_from_native(
            members,
            shapes,
            layout,
            where=join(owner, (site or spelling.read_out).format("*")),
            target=f"{path}.{{}}",
            read_out=not site,
        )
    return plan(names, changes, preset=layout.preset, spelling=spelling.name, native=False)


def _spelling(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> Spelling:
    """The spelling that most entries have."""
    plain = [plain_name(name) for name in shapes]
    counts = {spelling.name: [0, 0] for spelling in layout.spellings}
    for spelling in layout.spellings:
        for name in plain:
            found: Found | None = layout.find(name, spelling)
            if found is not None:
                counts[spelling.name][0 if found.site else 1] += 1
    best = max(layout.spellings, key=lambda spelling: sum(counts[spelling.name]))
    if not counts[best.name][0]:
        wanted = [
            site.format(layout.site[0].native[0].name) for spelling in layout.spellings for site in spelling.sites
        ]
        has_ours = any(".mhc." in f".{name}" for name in plain)
        raise CheckpointError(
            f"preset {layout.preset!r}: none of the {len(shapes)} entries has a name such as {', '.join(wanted)}"
            + ("; there are entries below 'mhc.', so it is in our layout already" if has_ours else "")
        )
    return best


def _reject_foreign(name: str, layout: Layout, spelling: Spelling) -> None:
    """Raises for an entry that is none of this layout, but one of a hyper-connection."""
    for other in LAYOUTS.values():
        for names in other.spellings:
            if other.find(name, names) is not None:
                raise CheckpointError(
                    f"preset {layout.preset!r}: {name!r} is an entry of {other.preset!r} as {names.name!r} files spell it; the others are spelt"
                    f" as in {spelling.name!r} files, and there it has no counterpart"
                )


def _branch(
    owner: str,
    site: str,
    spelling: Spelling,
    branches: Mapping[str, str],
    expected: Collection[str],
    names: Collection[str],
) -> str:
    """The branch of `owner` that a native site belongs to."""
    known = spelling.sites[site]
    candidates = [ours for ours, theirs in branches.items() if theirs in known] or list(known)
    if len(candidates) == 1:
        return candidates[0]
    for present in (
        [branch for branch in candidates if f"{connection_path(owner, branch)}.phi" in expected],
        [branch for branch in candidates if any(name.startswith(f"{join(owner, branch)}.") for name in names)],
    ):
        if len(present) == 1:
            return present[0]
    raise CheckpointError(
        f"{join(owner, site.format('*'))} may belong to any of the branches {', '.join(candidates)} of {owner!r}, and it is not clear to which;"
        f" say so with branches={{'<branch of your model>': {known[0]!r}}}"
    )


def _read_out(
    head: str,
    owners: list[str],
    heads: list[str],
    layout: Layout,
    spelling: Spelling,
    branches: Mapping[str, str],
    expected: Collection[str],
    names: Collection[str],
) -> str:
    """Where the read-out of the chain below `head` is here: with the chain's last hyper-connection."""
    ending = f".{READ_OUT}.weight"
    known = [name.removesuffix(".weight") for name in expected if name.endswith(ending) and name.startswith(head)]
    if len(known) == 1:
        return known[0]
    owner = last(head, owners, heads)
    if owner is None:
        raise CheckpointError(
            f"preset {layout.preset!r}: {head or 'the model'!r} has a read-out and no site below it, so there is no chain that it ends"
        )
    branch = _branch(owner, list(spelling.sites)[-1], spelling, branches, expected, names)
    return join(connection_path(owner, branch), READ_OUT)
