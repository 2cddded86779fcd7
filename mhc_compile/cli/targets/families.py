"""`zoo:FAMILY`: a model of the zoo, of 2 layers or as many as `--set layers=N` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.cli.error_handling import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["load"]


def load(name: str, settings: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model of a family, with inputs.

    Raises:
        TargetError: no such family, or another setting than `layers`.
    """
    from mhc_compile.tools import zoo

    layers = settings.get("layers", 2)
    unknown = sorted(set(settings) - {"layers"})
    if unknown or not isinstance(layers, int) or layers < 1:
        raise TargetError(f"zoo: targets have one setting, layers=N with N >= 1; found {dict(settings)}")
    try:
        family = zoo.get(name)
    except zoo.UnknownFamilyError as error:
        raise TargetError(str(error)) from error
    return family.build(layers)
