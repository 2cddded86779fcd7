"""Names of backends in `accelerate`, and so in the `Trainer` of `transformers`.

`accelerate` accepts the members of its enum `DynamoBackend` alone, which lists the backends that it
knows; `TrainingArguments(torch_compile_backend=...)` goes the same way.
"""

from __future__ import annotations

from typing import Any


def register_with_accelerate() -> None:
    """Let `accelerate` and the `Trainer` accept "mhc", and any other backend that torch knows.

    Afterwards `TrainingArguments(torch_compile=True, torch_compile_backend="mhc")`,
    `Accelerator(dynamo_backend="mhc")`, `TorchDynamoPlugin(backend="mhc", options={...})` and the
    environment variable `ACCELERATE_DYNAMO_BACKEND=mhc` work; without it they are a ValueError, as
    names that torch does not know still are.

    This patches `DynamoBackend` for good: it sets the hook that enums have for values that they do
    not list. Calling it again changes nothing.

    Raises:
        ImportError: `accelerate` is not installed.
    """
    from accelerate.utils import dataclasses

    accept_backends(dataclasses)


def accept_backends(dataclasses: Any) -> None:
    """Do it for the module `accelerate.utils.dataclasses`, where the list of backends is."""
    backends = dataclasses.DynamoBackend
    if getattr(backends._missing_, "__func__", None) is not _find_backend:
        backends._missing_ = classmethod(_find_backend)


def _find_backend(kind: Any, value: object) -> Any:
    """Return a new member for the name of a backend of torch, None for any other value."""
    import torch

    if not isinstance(value, str) or value.lower() not in torch.compiler.list_backends(exclude_tags=()):
        return None
    name = value.upper()
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    # One object for every use of the name, as with the members that are listed.
    return kind._value2member_map_.setdefault(name, member)
