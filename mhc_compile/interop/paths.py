"""Paths of modules, as names in a state dict spell them: owners, branches, read-outs, and the order of blocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mhc_compile.attachment.model_tree import CONTAINER

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["connection_path", "head_of", "join", "last", "split_connection"]

_PARTS = re.compile(rf"((?:.+?\.)?){CONTAINER}\.(.+)")


def join(*parts: str) -> str:
    """A path from parts, any of which may be empty."""
    return ".".join(filter(None, parts))


def connection_path(owner: str, branch: str) -> str:
    """The path of the hyper-connection of one of a module's branches."""
    return join(owner, CONTAINER, branch)


def split_connection(path: str) -> tuple[str, str] | None:
    """The owner and the branch of a hyper-connection's path, None if it is no such path."""
    match = _PARTS.fullmatch(path)
    return (match[1].removesuffix("."), match[2]) if match else None


def head_of(owner: str, alone: tuple[str, ...]) -> str:
    """The module that has the blocks of a chain, given the module that owns the chain's last site: "model" for "model.layers.31".

    Args:
        owner: path of a module, in a list of blocks or not.
        alone: names of lists of blocks of which each is a chain of its own, and so has its read-out itself.
    """
    parts = owner.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if not number:
        return ".".join(parts[:-1])
    return ".".join(parts[: number + 1] if parts[number - 1] in alone else parts[: number - 1])


def last(head: str, owners: Iterable[str], heads: Iterable[str]) -> str | None:
    """The last of the `owners` below `head` that are not below a nearer one of `heads`; None if there is none."""

    def below(owner: str, module: str) -> bool:
        return not module or owner == module or owner.startswith(module + ".")

    nearer = [other for other in heads if other != head and below(other, head)]
    own = [o for o in owners if below(o, head) and not any(below(o, other) for other in nearer)]
    return max(own, key=_natural, default=None)


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
