"""`file.pt2`: a program that `torch.export.save` wrote. Loading one can run code: it is trusted input, as a script is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mhc_compile.cli.error_handling import TargetError
from mhc_compile.cli.targets.near import near_files

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["load"]


def load(path: str) -> tuple[ExportedProgram, tuple[Any, ...], dict[str, Any]]:
    """The program with the example inputs that it was exported with.

    Raises:
        TargetError: no such file, none that torch.export can read, or a program without example inputs.
    """
    if not os.path.isfile(path):
        raise TargetError(f"there is no file {path!r} (looked in {os.getcwd()}){near_files(path)}")
    import torch

    try:
        program = torch.export.load(path)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise TargetError(
            f"{path!r} is no program that torch {torch.__version__} can load ({type(error).__name__}: {reason[0]}). Expected what"
            " torch.export.save(torch.export.export(model, inputs), path) writes"
        ) from error
    if program.example_inputs is None:
        raise TargetError(
            f"{path!r} was saved without example inputs, and nothing else says how it is called. Export it again, or write a factory that loads"
            " it and returns (program, args)"
        )
    args, kwargs = program.example_inputs
    return program, tuple(args), dict(kwargs)
