"""From names and shapes to a `Plan`, in either direction."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mhc_compile.attachment.model_tree import CONTAINER, plain_name
from mhc_compile.checkpoints.reader import READ_OUT
from mhc_compile.errors import CheckpointError, OptionError
from mhc_compile.interop.layouts import LAYOUTS, get_layout
from mhc_compile.interop.plan import Change, Plan, build_plan, site_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from mhc_compile.interop.layout import Layout, Spelling

    Shapes = Mapping[str, tuple[int, ...]]

_CONNECTION = re.compile(rf"((?:.+?\.)?){CONTAINER}\.(.+)")


def plan_from_native(
    shapes: Shapes,
    preset: str,
    *,
    branches: Mapping[str, str] | None = None,
    expected: Collection[str] = (),
) -> Plan:
    """Plan `from_native` for a state dict of these shapes; its names may contain `_orig_mod`.

    `expected` are the names of the model's own entries, if there is a model: they decide between
    branches that the native names leave open. Errors are those of `from_native`.
    """

    def attempt(layout: Layout) -> Plan:
        own = layout.preset == preset
        return _from_native(shapes, layout, (branches or {}) if own else {}, frozenset(expected if own else ()))

    return _plan_or_suggest(attempt, get_layout(preset), "The names and shapes are those of")


def plan_to_native(
    shapes: Shapes,
    preset: str,
    *,
    spelling: str = "transformers",
    branches: Mapping[str, str] | None = None,
) -> Plan:
    """Plan `to_native` for a state dict of these shapes; its names may contain `_orig_mod`."""
    layout = get_layout(preset)
    known = {known.name: known for known in layout.spellings}
    if spelling not in known:
        raise OptionError(
            f"spelling {spelling!r} is unknown to preset {preset!r}; expected one of {', '.join(map(repr, known))}"
        )

    def attempt(other: Layout) -> Plan:
        return _to_native(shapes, other, known[spelling] if other is layout else other.spellings[0], branches or {})

    return _plan_or_suggest(attempt, layout, "Names and shapes fit")


def _plan_or_suggest(attempt: Callable[[Layout], Plan], layout: Layout, words: str) -> Plan:
    """Return the plan for `layout`; an error names the presets for which there is a plan."""
    try:
        return attempt(layout)
    except CheckpointError as error:
        fitting = []
        for other in LAYOUTS.values():
            try:
                if other is not layout:
                    attempt(other)
                    fitting.append(repr(other.preset))
            except CheckpointError:
                continue
        if not fitting:
            raise
        raise CheckpointError(f"{error}. {words} {' or '.join(fitting)}") from None


# From native


def _from_native(shapes: Shapes, layout: Layout, branches: Mapping[str, str], expected: Collection[str]) -> Plan:
    names = {name: plain_name(name) for name in shapes}
    spelling = _guess_spelling(names.values(), layout)
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, plain in names.items():
        found = layout.find(plain, spelling)
        if found is not None:
            groups.setdefault(found[:2], {})[found[2]] = name
        else:
            _reject_foreign(plain, layout, spelling)
    owners = list(dict.fromkeys(owner for owner, site in groups if site))
    heads = [owner for owner, site in groups if not site]
    if layout.read_out and not heads:
        entry = spelling.read_out.format(layout.read_out[0].native[0].name)
        raise CheckpointError(
            f"preset {layout.preset!r}: there is no read-out (an entry {entry!r}), with which this system ends its chain"
        )

    def connection_of(owner: str, site: str) -> str:
        """Return our path of the hyper-connection of a native site."""
        known = spelling.sites[site]
        candidates = [ours for ours, theirs in branches.items() if theirs in known] or list(known)
        if len(candidates) > 1:  # the branch of the model, else the one that has entries
            present = [branch for branch in candidates if f"{_join(owner, CONTAINER, branch)}.phi" in expected]
            prefixes = {branch: f"{_join(owner, branch)}." for branch in candidates}
            entries = [b for b in candidates if any(plain.startswith(prefixes[b]) for plain in names.values())]
            candidates = next((some for some in (present, entries) if len(some) == 1), candidates)
        if len(candidates) == 1:
            return _join(owner, CONTAINER, candidates[0])
        raise CheckpointError(
            f"{_join(owner, site.format('*'))} may belong to any of the branches {', '.join(candidates)} of {owner!r},"
            f" and it is not clear to which; say so with branches={{'<branch of your model>': {known[0]!r}}}"
        )

    def read_out_of(head: str) -> str:
        """Return our path of the read-out of the chain below `head`: it is in its last site."""
        suffix = f".{READ_OUT}.weight"
        known = [name.removesuffix(".weight") for name in expected if name.endswith(suffix) and name.startswith(head)]
        if len(known) == 1:
            return known[0]
        owner = _last_owner(head, owners, heads)
        if owner is None:
            raise CheckpointError(
                f"preset {layout.preset!r}: {head or 'the model'!r} has a read-out and no site below it, so there is no"
                " chain that it ends"
            )
        return _join(connection_of(owner, list(spelling.sites)[-1]), READ_OUT)

    changes: list[Change] = []
    for (owner, site), members in groups.items():
        changes += site_changes(
            members,
            shapes,
            layout,
            where=_join(owner, (site or spelling.read_out).format("*")),
            target=f"{connection_of(owner, site) if site else read_out_of(owner)}.{{}}",
            read_out=not site,
            native=False,
        )
    return build_plan(names, changes, preset=layout.preset, spelling=spelling.name, native=False)


def _guess_spelling(names: Collection[str], layout: Layout) -> Spelling:
    """Return the spelling that most of the native names have."""
    found = {s.name: [f for name in names if (f := layout.find(name, s)) is not None] for s in layout.spellings}
    best = max(layout.spellings, key=lambda spelling: len(found[spelling.name]))
    if not any(site for _, site, _ in found[best.name]):
        wanted = [site.format(layout.site[0].native[0].name) for s in layout.spellings for site in s.sites]
        converted = any(f".{CONTAINER}." in f".{name}" for name in names)
        raise CheckpointError(
            f"preset {layout.preset!r}: none of the {len(names)} entries has a name such as {', '.join(wanted)}"
            + (f"; there are entries below '{CONTAINER}.', so it is in our layout already" if converted else "")
        )
    return best


def _reject_foreign(name: str, layout: Layout, spelling: Spelling) -> None:
    """Raise for a name that belongs to another layout or spelling: it would be copied silently."""
    for other in LAYOUTS.values():
        for names in other.spellings:
            if other.find(name, names) is not None:
                raise CheckpointError(
                    f"preset {layout.preset!r}: {name!r} is an entry of {other.preset!r} as {names.name!r} files spell it;"
                    f" the others are spelt as in {spelling.name!r} files, and there it has no counterpart"
                )


# To native


def _to_native(shapes: Shapes, layout: Layout, spelling: Spelling, branches: Mapping[str, str]) -> Plan:
    names = {name: plain_name(name) for name in shapes}
    groups = _connection_groups(names, layout)
    if not groups:
        raise CheckpointError(
            f"preset {layout.preset!r}: none of the {len(shapes)} entries is one of a hyper-connection (a name such as"
            f" 'layers.0.{CONTAINER}.self_attn.phi'): it is a checkpoint of the plain model, or in a native layout already"
        )
    changes: list[Change] = []
    for path, members in groups.items():
        owner, branch = _split_connection(path) or ("", "")
        read_out = branch.endswith(f".{READ_OUT}")
        if read_out and not layout.read_out:
            raise CheckpointError(
                f"preset {layout.preset!r}: {path} is a learned read-out, and this system ends its chain with the mean of"
                " the streams"
            )
        target = (
            _join(_head_of(owner, spelling.alone), spelling.read_out)
            if read_out
            else _join(owner, _site_template(path, branch, layout, spelling, branches))
        )
        changes += site_changes(members, shapes, layout, where=path, target=target, read_out=read_out, native=True)
    if layout.read_out and not any(path.endswith(f".{READ_OUT}") for path in groups):
        raise CheckpointError(
            f"preset {layout.preset!r}: there is no read-out (an entry '<last site>.{READ_OUT}.weight'), with which this"
            f" system ends its chain: the model was attached without options={{'preset': {layout.preset!r}}} or"
            " read_out='learned'"
        )
    return build_plan(names, changes, preset=layout.preset, spelling=spelling.name, native=True)


def _connection_groups(names: Mapping[str, str], layout: Layout) -> dict[str, dict[str, str]]:
    """Return the entries of every hyper-connection: {"layers.0.mhc.mlp": {"phi": name, ...}}."""
    groups: dict[str, dict[str, str]] = {}
    for name, plain in names.items():
        path, _, parameter = plain.rpartition(".")
        if _split_connection(path) is None:
            continue
        known = [entry.ours for entry in (layout.read_out if path.endswith(f".{READ_OUT}") else layout.site)]
        if parameter not in known and known:
            raise CheckpointError(
                f"preset {layout.preset!r}: {plain!r} has no counterpart; of its hyper-connections there are"
                f" {', '.join(known)}"
            )
        groups.setdefault(path, {})[parameter] = name
    return groups


def _site_template(path: str, branch: str, layout: Layout, spelling: Spelling, branches: Mapping[str, str]) -> str:
    """Return the template of the native names of a branch's parameters."""
    theirs = branches.get(branch, branch)
    for site, known in spelling.sites.items():
        if theirs in known:
            return site
    table = ", ".join(f"{name!r} is {site.format('*')}" for site, known in spelling.sites.items() for name in known)
    example = next(iter(spelling.sites.values()))[0]
    raise CheckpointError(
        f"preset {layout.preset!r}: {path} is a site of a branch called {theirs!r}, which this system does not have"
        f" ({table}). Map it to one of them with branches={{{branch!r}: {example!r}}}"
    )


# Module paths


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _split_connection(path: str) -> tuple[str, str] | None:
    """Return owner and branch from the path of a hyper-connection, None for any other path."""
    match = _CONNECTION.fullmatch(path)
    return (match[1].removesuffix("."), match[2]) if match else None


def _head_of(owner: str, alone: tuple[str, ...]) -> str:
    """Return the module that has the blocks of a chain: "model" if it ends in "model.layers.31".

    In the module lists called `alone` every block is a chain of its own.
    """
    parts = owner.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if not number:
        return ".".join(parts[:-1])
    return ".".join(parts[: number + 1] if parts[number - 1] in alone else parts[: number - 1])


def _last_owner(head: str, owners: Iterable[str], heads: Iterable[str]) -> str | None:
    """Return the last of `owners` of which `head` is the nearest of `heads`, or None."""

    def below(owner: str, module: str) -> bool:
        return not module or owner == module or owner.startswith(module + ".")

    def order(path: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]

    nearer = [other for other in heads if other != head and below(other, head)]
    own = [owner for owner in owners if below(owner, head) and not any(below(owner, other) for other in nearer)]
    return max(own, key=order, default=None)
