"""All checks, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.tools.doctor import machine, surroundings
from mhc_compile.tools.doctor.finding import Finding, Report
from mhc_compile.tools.doctor.tiny import tiny_compile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["examine"]

_CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    surroundings.environment,  # before torch is imported: it sets variables of its own
    surroundings.versions,
    surroundings.backend,
    surroundings.optional_packages,
    machine.compiler,
    machine.accelerator,
    machine.caches,
    tiny_compile,
)


def examine() -> Report:
    """Runs every check; one that breaks is a failed finding. Takes a few seconds, up to a minute where nothing was compiled before."""
    return Report(tuple(_findings()))


def _findings() -> Iterator[Finding]:
    for check in _CHECKS:
        try:
            yield from check()
        except Exception as error:
            name = check.__name__.replace("_", " ")
            text = f"{type(error).__name__}: {error}"
            yield Finding(name, "failed", text, "The check itself broke; please report it.")
