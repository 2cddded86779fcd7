"""From names and shapes in our layout to the plan that brings them into a native one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.checkpoints.load import plain_name
from mhc_compile.errors import CheckpointError, OptionError
from mhc_compile.interop.entries import changes_to_native
from mhc_compile.interop.layout import READ_OUT, Layout, Spelling
from mhc_compile.interop.layouts import LAYOUTS, get_layout
from mhc_compile.interop.paths import head_of, join, split_connection
from mhc_compile.interop.plan import Change, Plan, plan

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["plan_to_native"]


def plan_to_native(
    shapes: Mapping[str, tuple[int, ...]],
    preset: str,
    *,
    spelling: str = "transformers",
    branches: Mapping[str, str] | None = None,
) -> Plan:
    """How a state dict in our layout comes into a native one.

    Args:
        shapes: names and shapes of its entries. Names may have the `_orig_mod.` of `torch.compile`.
        preset: the system that it shall be of.
        spelling: the names that it shall have: "transformers", or another one of the layout's spellings.
        branches: for models whose branches have other names than the system's: {"attn": "self_attn"}.

    Raises:
        OptionError: no such preset, one without a layout, or no such spelling.
        CheckpointError: there are no hyper-connections, or they are not of the system's kind, or have no counterpart there.
    """
    layout = get_layout(preset)
    names_there = layout.spelling(spelling)
    if names_there is None:
        known = ", ".join(repr(known.name) for known in layout.spellings)
        raise OptionError(f"spelling {spelling!r} is unknown to preset {preset!r}; expected one of {known}")
    try:
        return _plan(shapes, layout, names_there, branches or {})
    except CheckpointError as error:
        others = [other for other in LAYOUTS if other != preset and _fits(shapes, other, branches or {})]
        if not others:
            raise
        raise CheckpointError(f"{error}. Names and shapes fit {' or '.join(map(repr, others))}") from None


def _fits(shapes: Mapping[str, tuple[int, ...]], preset: str, branches: Mapping[str, str]) -> bool:
    layout = LAYOUTS[preset]
    try:
        _plan(shapes, layout, layout.spellings[0], branches)
    except CheckpointError:
        return False
    return True


def _plan(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, spelling: Spelling, branches: Mapping[str, str]
) -> Plan:
    names = {name: plain_name(name) for name in shapes}
    groups = _groups(names, layout)
    if not groups:
        raise CheckpointError(
            f"preset {layout.preset!r}: none of the {len(shapes)} entries is one of a hyper-connection (a name such as"
            " 'layers.0.mhc.self_attn.phi'): it is a checkpoint of the plain model, or in a native layout already"
        )
    changes: list[Change] = []
    for path, members in groups.items():
        owner, branch = split_connection(path) or ("", "")
        read_out = branch.endswith(f".{READ_OUT}")
        target = (
            join(head_of(owner, spelling.alone), _read_out(path, layout, spelling))
            if read_out
            else join(owner, _site(path, branch, layout, spelling, branches))
        )
        changes += changes_to_native(members, shapes, layout, where=path, target=target, read_out=read_out)
    if layout.read_out and not any(path.endswith(f".{READ_OUT}") for path in groups):
        raise CheckpointError(
            f"preset {layout.preset!r}: there is no read-out (an entry '<last site>.{READ_OUT}.weight'), with which this system ends its chain:"
            f" the model was attached without options={{'preset': {layout.preset!r}}} or read_out='learned'"
        )
    return plan(names, changes, preset=layout.preset, spelling=spelling.name, native=True)


def _groups(names: Mapping[str, str], layout: Layout) -> dict[str, dict[str, str]]:
    """The entries of every hyper-connection: {"layers.0.mhc.mlp": {"phi": name, ...}}."""
    groups: dict[str, dict[str, str]] = {}
    for name, plain in names.items():
        path, _, parameter = plain.rpartition(".")
        if split_connection(path) is None:
            continue
        entries = layout.read_out if path.endswith(f".{READ_OUT}") else layout.site
        known = [entry.ours for entry in entries]
        if parameter not in known and known:
            raise CheckpointError(
                f"preset {layout.preset!r}: {plain!r} has no counterpart; of its hyper-connections there are {', '.join(known)}"
            )
        groups.setdefault(path, {})[parameter] = name
    return groups


def _site(path: str, branch: str, layout: Layout, spelling: Spelling, branches: Mapping[str, str]) -> str:
    """The template of the names of a branch's parameters."""
    called = branches.get(branch, branch)
    for site, known in spelling.sites.items():
        if called in known:
            return site
    table = ", ".join(f"{name!r} is {site.format('*')}" for site, known in spelling.sites.items() for name in known)
    theirs = next(iter(spelling.sites.values()))[0]
    raise CheckpointError(
        f"preset {layout.preset!r}: {path} is a site of a branch called {called!r}, which this system does not have ({table})."
        f" Say what it is there with branches={{{branch!r}: {theirs!r}}}"
    )


def _read_out(path: str, layout: Layout, spelling: Spelling) -> str:
    if not layout.read_out:
        raise CheckpointError(
            f"preset {layout.preset!r}: {path} is a learned read-out, and this system ends its chain with the mean of the streams"
        )
    return spelling.read_out
