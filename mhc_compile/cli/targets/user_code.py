"""Targets that users write: `package.module:factory`, `path/to/file.py:factory` and `file.pt2`.

Loading any of them, an exported program included, can run code: they are trusted input.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from mhc_compile.cli.error_handling import FactoryError, TargetError, near_files, near_names, one_line, require_file

if TYPE_CHECKING:
    from types import ModuleType

_EXPECTED = "(model, args) or (model, args, kwargs), args a tuple of example inputs"


def load_program(path: str) -> tuple[ExportedProgram, tuple[Any, ...], dict[str, Any]]:
    """Return a program that `torch.export.save` wrote, with the inputs that it was exported with.

    Raises:
        TargetError: no such file, no exported program, or one without example inputs.
    """
    require_file(path)
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises whatever its unpickler or a schema check meets
        raise TargetError(
            f"{path!r} is no program that torch {torch.__version__} can load ({one_line(error)})."
            " Expected what torch.export.save(torch.export.export(model, inputs), path) writes"
        ) from error
    if program.example_inputs is None:
        raise TargetError(
            f"{path!r} was saved without example inputs, and nothing else says how it is called. Export it again, or"
            " write a factory that loads it and returns (program, args)"
        )
    args, kwargs = program.example_inputs
    return program, tuple(args), dict(kwargs)


def load_factory(file: str, name: str) -> tuple[nn.Module | ExportedProgram, tuple[Any, ...], dict[str, Any]]:
    """Return the result of the factory `name` of a module or file, or the exported program `name`.

    Raises:
        TargetError: there is no such file, module or name, it is no factory, or its result is not
            a model with example inputs.
        FactoryError: the code of the file or of the factory raised.
    """
    target = f"{file}:{name}"
    module = _module(file)
    found = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = near_names(name, own) or near_names(name, dir(module))
        raise TargetError(f"{file} has no {name!r}{hint}")
    if isinstance(found, type) and issubclass(found, nn.Module):
        raise TargetError(f"{target} is a class; expected a function without arguments that returns {_EXPECTED}")
    if not callable(found) and not isinstance(found, ExportedProgram):
        raise TargetError(f"{target} is {type(found).__name__}; expected a function that returns {_EXPECTED}")
    try:
        made: Any = found if isinstance(found, (nn.Module, ExportedProgram)) else found()
    except Exception as error:  # the user's code may raise anything; the error names its line
        raise _failed(f"{target} raised", error) from error
    if isinstance(made, ExportedProgram) and made.example_inputs is not None:
        args, kwargs = made.example_inputs
        return made, tuple(args), dict(kwargs)
    if isinstance(made, (nn.Module, ExportedProgram)):
        raise TargetError(
            f"{target} is a model alone ({type(made).__name__}), and nothing says how it is called; expected a function"
            f" that returns {_EXPECTED}"
        )
    model, args, kwargs = (*made, {})[:3] if isinstance(made, tuple) and len(made) in {2, 3} else (made, None, None)
    kinds: tuple[Any, ...] = ((nn.Module, ExportedProgram), tuple, dict)
    if not all(map(isinstance, (model, args, kwargs), kinds)):
        shown = tuple(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise TargetError(f"{target} returned {shown}; expected {_EXPECTED}")
    return model, args, kwargs


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _file(name)
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            files = near_files(f"{name.replace('.', os.sep)}.py").replace(".py", "") if "." not in name else ""
            raise TargetError(
                f"module {name!r} could not be imported: {error} (looked in {os.getcwd()} too){files}"
            ) from error
        raise _failed(f"module {name} could not be imported: it raised", error) from error
    except Exception as error:  # as in `load_factory`
        raise _failed(f"module {name} could not be imported: it raised", error) from error


def _file(path: str) -> ModuleType:
    require_file(path)
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as `python path/to/file.py` does
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as in `load_factory`
        raise _failed(f"{path} could not be run: it raised", error) from error
    return module


def _failed(what: str, error: Exception) -> FactoryError:
    """Return an error with the innermost line of the user's code, and of a library below it."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    elif frames:
        own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
        where = f"{os.path.relpath(own[-1].filename)}:{own[-1].lineno}"
        if own[-1] is not frames[-1]:
            where += f", in {frames[-1].filename}:{frames[-1].lineno}"
    else:
        where = "outside any file"
    return FactoryError(f"{what} {one_line(error, None)} ({where})")
