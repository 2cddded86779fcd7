"""Names of backends in `accelerate`, and so in the `Trainer` of `transformers`.

`accelerate` takes the name of a backend only if it is a member of its enum `DynamoBackend`, which ends at the backends that it knows of;
`TrainingArguments(torch_compile_backend=...)` goes the same way.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register_with_accelerate"]


def register_with_accelerate() -> None:
    """Lets `accelerate` and the `Trainer` of `transformers` take "mhc", and any other backend that torch knows, by name.

    Afterwards `TrainingArguments(torch_compile=True, torch_compile_backend="mhc")`, `Accelerator(dynamo_backend="mhc")`,
    `TorchDynamoPlugin(backend="mhc", options={...})` and the environment variable `ACCELERATE_DYNAMO_BACKEND=mhc` work; without it they are a
    ValueError. Names that torch does not know stay one. Calling it twice is calling it once.

    Raises:
        ImportError: `accelerate` is not installed.
    """
    from accelerate.utils import DynamoBackend

    # The enum's own hook for values that it does not list.
    DynamoBackend._missing_ = classmethod(_known_to_torch)


def _known_to_torch(kind: Any, value: object) -> Any:
    import torch

    if not isinstance(value, str) or value.lower() not in torch.compiler.list_backends(exclude_tags=()):
        return None
    name = value.upper()
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    # The same object for every use of the name, as with the members that are listed.
    return kind._value2member_map_.setdefault(name, member)
