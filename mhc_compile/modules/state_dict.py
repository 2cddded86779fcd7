"""Loading of state dicts: keep values that are not in them, and explain what does not fit.

`nn.Module.load_state_dict` shows every module its own entries alone. A state dict without any
hyper-connection (that of a plain model) is accepted, one that lacks some is an error; the
difference is known only after several modules were loaded, so each call of `load_state_dict` has a
record of what its modules found.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import StartsOffMeta, placements
from mhc_compile.config.coefficient_spec import MAX_STREAMS
from mhc_compile.errors import warn
from mhc_compile.mappings import MAPPINGS, columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: The parameters of a hyper-connection.
NAMES = ("phi", "bias", "scale")
#: Settings that change the function of these parameters: metadata of a state dict, which torch.save
#: keeps and safetensors does not.
SETTINGS = ("mapping", "iterations", "eps", "preset", "gate_speed", "scale_speed")

#: The number of streams of every system that ships mHC.
_USUAL = 4


@dataclass
class Load:
    """The record of one call of `load_state_dict`."""

    missing: list[str]  # torch's list of missing keys
    kept: list[str] = field(default_factory=list)  # keys of hyper-connections that kept their values
    found: bool = False  # whether the state dict has values for a hyper-connection
    said: set[str] = field(default_factory=set)  # sentences that were said once in this call

    def once(self, sentence: str) -> str:
        """Return " sentence", but "" where this call has said it before."""
        new = sentence not in self.said
        self.said.add(sentence)
        return f" {sentence}" if new else ""


class _Loads(threading.local):
    """The latest calls of this thread.

    A call is recognized by the identity of torch's list of missing keys: torch passes the same list
    to all modules of one call, and a new one in the next call. Nothing else that reaches a module
    stands for the call, and a hook at its end would have to be on the root, which is the user's.
    The record holds the list, so that its identity is not reused; several records are kept because
    a module may call `load_state_dict` of another one while it is loaded.
    """

    def __init__(self) -> None:
        self.latest: deque[Load] = deque(maxlen=8)

    def of(self, missing: list[str]) -> Load:
        for load in self.latest:
            if load.missing is missing:
                return load
        self.latest.append(Load(missing))
        return self.latest[-1]


_loads = _Loads()


class LoadsPartially(StartsOffMeta):
    """Base class whose parameters stay as they are if a state dict has no hyper-connections.

    Parameters on the meta device get their start when they leave it. A shard of a distributed
    parameter gets its share of the start.
    """

    #: The parameters, in the order in which they are declared to a tracer.
    names: tuple[str, str, str]
    init: str
    rank: int

    @property
    def random_start(self) -> bool:
        """Whether the start has random numbers."""
        return self.init == "random" or self.rank > 0

    def start(self) -> dict[str, Tensor]:
        """Return the start of every parameter, whole and on the CPU."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Write the start of the options."""
        self.write_start(self.names)

    @torch.no_grad()
    def write_start(self, names: Iterable[str]) -> None:
        """Write the start of the parameters of these names, except of those on the meta device."""
        todo = {name: self.get_parameter(name) for name in names}
        todo = {name: parameter for name, parameter in todo.items() if not parameter.is_meta}
        if not todo:
            return
        with torch.device("cpu"):  # also inside `with torch.device("meta")`
            values = self.start()
        for name, parameter in todo.items():
            value, shards = values[name], placements(parameter)
            if shards is not None:
                from torch.distributed.tensor import distribute_tensor

                value = value.to(parameter.device, parameter.dtype)
                source = 0 if self.random_start else None  # rank 0 draws; what is equal needs no message
                value = distribute_tensor(value, parameter.device_mesh, shards, src_data_rank=source)  # type: ignore[attr-defined]
            parameter.copy_(value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; write the start where transformers has put in empty parameters.

        It sets `_is_hf_initialized` on parameters that it loaded, and on a module after the model's
        own init, which knows no hyper-connections, of the module.
        """
        if isinstance(value, nn.Parameter) and not value.is_meta and not hasattr(value, "_is_hf_initialized"):
            before = getattr(self, name, None)
            if isinstance(before, nn.Parameter) and before.is_meta:
                self.__dict__.setdefault("_unwritten", set()).add(name)
        elif name == "_is_hf_initialized" and value:
            self.write_start(self.__dict__.pop("_unwritten", ()))
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        lists = (missing_keys, unexpected_keys, error_msgs)
        state_dict = self.converted(state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.__dict__.pop("_unwritten", None)  # what assign=True put in has its values
        load = _loads.of(missing_keys)
        keys = [prefix + name for name in self.names]
        if not all(key in missing_keys for key in keys):
            load.found = True
            missing_keys.extend(load.kept)  # some are there and some are not: no plain model's state dict
            load.kept.clear()
            if all(isinstance(state_dict.get(key), Tensor) for key in keys):
                self._check_loaded(state_dict, prefix, local_metadata, error_msgs, load)
            return
        if load.found or any(parameter.is_meta for parameter in self.parameters()):
            return  # on the meta device there are no values to keep
        if not load.kept:
            warn(
                f"the state dict has no values for the hyper-connection {prefix.removesuffix('.')!r}: it looks like one"
                " of the plain model. This hyper-connection and all others that it lacks keep the values they have"
            )
        missing_keys[:] = [key for key in missing_keys if key not in keys]
        load.kept.extend(keys)

    def converted(self, state: Mapping[str, Any], prefix: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return `state` with values for the parametrisation of this module."""
        return state

    def _check_loaded(
        self, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str], load: Load
    ) -> None:
        """Check the tensors for this module; `errors` are changed in place."""


def saved_speeds(settings: Mapping[str, Any], unknown: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of saved bias and scale in logits, `unknown` without any settings.

    Settings without a gate_speed are of a version in which both were 1, and those without a
    scale_speed of one in which both were the gate_speed.
    """
    if "mapping" not in settings and "gate_speed" not in settings:
        return dict(unknown)
    speed = float(settings.get("gate_speed", 1.0))
    return {"bias": speed, "scale": float(settings.get("scale_speed", speed))}


def guess_options(shape: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """Return all `(streams, mapping, width)` for a phi of shape [n C, K], the likeliest first.

    Shapes do not determine the mapping: "unconstrained" always looks like "sinkhorn", which comes
    first as the most used one. Then come guesses with four streams, then the older mappings.
    """
    if len(shape) != 2:
        return []
    found = [
        (n, name, shape[0] // n)
        for name in MAPPINGS
        for n in range(1, MAX_STREAMS + 1)
        if columns(name, n) == shape[1] and shape[0] % n == 0
    ]
    found.sort(key=lambda entry: (entry[1] != "sinkhorn", entry[0] != _USUAL))
    return found


def guess_for(owner: nn.Module | None, shape: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """Return the `guess_options` whose width C is a size of a parameter of `owner`."""
    sizes = {size for parameter in owner.parameters() for size in parameter.shape} if owner is not None else set()
    return [guess for guess in guess_options(shape) if not sizes or guess[2] in sizes]
