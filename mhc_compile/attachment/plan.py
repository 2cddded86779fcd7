"""A plan: where the hyper-connections of models belong, as a file.

Sites are found in a captured graph, which exists at the first compiled call. A plan keeps what was
found, so that a model can have its parameters as soon as it is constructed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.attachment.declaration import declare_on, declaring_paths, start_branch, starting_paths
from mhc_compile.attachment.model_tree import (
    HyperConnections,
    can_be_called,
    connections,
    find_module,
    plain_name,
    split_path,
    unwrap,
)
from mhc_compile.attachment.sites import put_connection
from mhc_compile.attachment.structure import difference, fingerprint, structure_of
from mhc_compile.config.options import PER_SITE, Options, ResolvedOptions
from mhc_compile.errors import AttachError, PlanError
from mhc_compile.modules.gated import create_connection

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from mhc_compile.attachment.structure import Structure
    from mhc_compile.modules.hyper_connection import HyperConnection

#: The version of the file format.
VERSION = 1
#: The options that determine parameters and their start; all others belong to a run.
PLANNED_OPTIONS = (
    "preset", "streams", "mapping", "token_dependent", "read_out", "single_pass", "rank", "iterations", "init",
    "init_gain", "init_stream_weight", "gate_speed", "scale_speed", "eps",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedConnection:
    """The hyper-connection of one site.

    Attributes:
        path: its path in the model, "h.0.mhc.attn".
        width: C.
        index: position of the site in its chain.
        declared_by: paths of the modules whose calls declare the parameters.
        started_by: paths of the modules that start the branch in another graph.
        last: whether it has a learned read-out.
        dtype: dtype of the parameters.
        options: those that differ from the plan's.
    """

    path: str
    width: int
    index: int
    declared_by: tuple[str, ...]
    started_by: tuple[str, ...] = ()
    last: bool = False
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The path of the module that performs the add."""
        return split_path(self.path)[0]

    @property
    def name(self) -> str:
        """The name of the site in its owner."""
        return split_path(self.path)[1]


@dataclass(frozen=True)
class ModelPlan:
    """The hyper-connections of one class of models with one structure."""

    kind: str  # the qualified name of the class
    options: Mapping[str, Any]  # the options that its hyper-connections have in common
    connections: tuple[PlannedConnection, ...]
    structure: Structure

    @classmethod
    def of(cls, model: nn.Module) -> ModelPlan:
        """Read the plan of a model that has hyper-connections."""
        found = {plain_name(path): connection for path, connection in connections(model).items()}
        common = _common(settings_of(connection) for connection in found.values())
        declared, started = declaring_paths(model), starting_paths(model)
        entries = tuple(
            PlannedConnection(
                path,
                connection.width,
                connection.index,
                tuple(map(plain_name, declared.get(connection, ()))),
                tuple(map(plain_name, started.get(connection, ()))),
                connection.read_out is not None,
                str(connection.phi.dtype).removeprefix("torch."),
                {name: value for name, value in settings_of(connection).items() if value != common[name]},
            )
            for path, connection in found.items()
        )
        structure = structure_of(model, {entry.owner for entry in entries})
        return cls(_torch.plain_class(unwrap(model)).__qualname__, common, entries, structure)

    def misfit(self, model: nn.Module) -> str | None:
        """Return how the structure of `model` differs as a sentence; None if the plan fits."""
        return difference(self.structure, structure_of(model, {entry.owner for entry in self.connections}))

    def apply(self, model: nn.Module, options: ResolvedOptions) -> None:
        """Attach the planned hyper-connections to a model of this structure.

        `options` are those of the run; those that determine parameters are the plan's.
        """
        shared = replace(options, **self.options, overrides={})
        for entry in self.connections:
            give(model, entry, replace(shared, **entry.options))


@dataclass(frozen=True)
class Plan:
    """The hyper-connections of one or several models; see `mhc_compile.plan`."""

    models: tuple[ModelPlan, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """Read the plan of a model that has hyper-connections.

        It is the plan of the innermost module that contains them all and can be called: that of
        `LlamaModel` holds for every model with a head on top of it.

        Raises:
            AttachError: the model has none.
        """
        if not connections(model):
            raise AttachError(
                f"{type(unwrap(model)).__name__} has no hyper-connections to plan. Give example inputs"
                " (mhc_compile.plan(model, *inputs)), or call the compiled model first"
            )
        return cls((ModelPlan.of(planned_root(model)),))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(file).write_text(self.dumps(), encoding="utf-8")

    def dumps(self) -> str:
        """Return the plan as JSON, one line for each hyper-connection."""
        blocks = []
        for model in self.models:
            head = {"class": model.kind, "fingerprint": fingerprint(model.structure), "options": dict(model.options)}
            fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
            entries = ",\n    ".join(json.dumps(_short(entry)) for entry in model.connections)
            structure = json.dumps(model.structure, indent=1).replace("\n", "\n   ")
            fields += [f'"connections": [\n    {entries}\n   ]', f'"structure": {structure}']
            blocks.append("  {" + ",\n   ".join(fields) + "}")
        return f'{{"mhc_plan": {VERSION},\n "models": [\n' + ",\n".join(blocks) + "\n ]}\n"

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            FileNotFoundError: there is no such file.
            PlanError: the file is no plan, or of a newer version.
        """
        try:
            return cls.loads(Path(file).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, PlanError) as error:
            reason = str(error) if isinstance(error, PlanError) else "it is no JSON"
            raise PlanError(
                f"{os.fspath(file)!r} is no plan: {reason}. `mhc plan TARGET -o FILE` or `mhc plan -o FILE train.py`"
                " makes one; a checkpoint is given to mhc_compile.restore"
            ) from None

    @classmethod
    def loads(cls, text: str) -> Plan:
        """Read a plan from its JSON."""
        data = json.loads(text)
        version = data.get("mhc_plan") if isinstance(data, dict) else None
        if not isinstance(version, int):
            raise PlanError("it has no entry 'mhc_plan'")
        if version > VERSION:
            raise PlanError(f"it has version {version}, and this mhc_compile reads versions up to {VERSION}")
        try:
            return cls(tuple(_model_plan(model) for model in data["models"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"an entry is missing or wrong ({type(error).__name__}: {error})") from None

    def matching(self, kind: type[nn.Module]) -> list[ModelPlan]:
        """Return the plans of a class."""
        return [model for model in self.models if model.kind == kind.__qualname__]

    def apply(self, model: nn.Module, options: ResolvedOptions) -> list[nn.Module]:
        """Attach to every module inside `model` that a plan fits. Return these modules.

        Raises:
            AttachError: no module fits; the message says what differs.
        """
        self.check_options(options)
        misfits, done = [], []
        for path, module in unwrap(model).named_modules():
            for planned in self.matching(type(module)):
                misfit = planned.misfit(module)
                if misfit is None:
                    planned.apply(module, options)
                    done.append(module)
                    break
                misfits.append(f"{path or type(module).__name__}: {misfit}")
        if not done:
            kinds = ", ".join(dict.fromkeys(planned.kind for planned in self.models))
            reason = misfits[0] if misfits else f"no module of it is a {kinds}"
            raise AttachError(
                f"the plan does not fit {type(unwrap(model)).__name__}: {reason}. Build the model that was planned, or"
                " make the plan again"
            )
        return done

    def check_options(self, options: ResolvedOptions) -> None:
        """Raise PlanError if given options contradict the plan; those left at a default do not."""
        default = Options().resolved
        for planned in self.models:
            for name, wants in planned.options.items():
                has = getattr(options, name)
                if has not in (wants, getattr(default, name)):
                    raise PlanError(
                        f"the plan of {planned.kind} was made with {name}={wants!r}, and the options say {name}={has!r}."
                        " Make the plan again with these options, or leave them out"
                    )


def planned_root(model: nn.Module) -> nn.Module:
    """Return the innermost callable module that contains all hyper-connections of `model`."""
    root = module = unwrap(model)
    wanted = set(connections(module).values())
    while True:
        inside = [
            child
            for child in module.children()
            if not isinstance(child, HyperConnections) and wanted <= set(connections(child).values())
        ]
        if not inside:
            return root
        module = unwrap(inside[0])
        if can_be_called(module):
            root = module


def give(
    model: nn.Module, entry: PlannedConnection, options: ResolvedOptions, *, device: torch.device | None = None
) -> HyperConnection:
    """Attach one planned hyper-connection, at its start, and return it."""
    owner = find_module(model, entry.owner, entry.path)
    neighbour = next(owner.parameters(), None)
    connection = create_connection(
        entry.width,
        options,
        index=entry.index,
        last=entry.last,
        device=neighbour.device if neighbour is not None else device,
        dtype=getattr(torch, entry.dtype),
    )
    put_connection(owner, entry.name, connection, options, root=model, path=entry.owner)
    for path in entry.declared_by:
        declare_on(find_module(model, path, entry.path), connection)
    for path in entry.started_by:
        start_branch(find_module(model, path, entry.path), connection, entry.name)
    return connection


def options_of(model: nn.Module, options: ResolvedOptions) -> ResolvedOptions:
    """Return `options` with what the hyper-connections of `model` were attached with."""
    settings = {split_path(path): settings_of(connection) for path, connection in connections(model).items()}
    if not settings:
        return options
    common = _common(settings.values())
    single = {
        f"{owner}.{name}".lstrip("."): {
            key: value for key, value in own.items() if value != common[key] and key in PER_SITE
        }
        for (owner, name), own in settings.items()
    }
    return replace(options, **common, overrides={path: differing for path, differing in single.items() if differing})


def _common(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(Counter(tuple(own.items()) for own in settings).most_common(1)[0][0])


def settings_of(connection: HyperConnection) -> dict[str, Any]:
    """Return the options that a hyper-connection was made with."""
    private = {"read_out": "end", "init_gain": "_init_gain", "init_stream_weight": "_init_stream_weight"}
    return {name: getattr(connection, private.get(name, name)) for name in PLANNED_OPTIONS}


def _short(entry: PlannedConnection) -> dict[str, Any]:
    """Return the fields of an entry that differ from their defaults."""
    required = {"path", "width", "index", "declared_by"}
    values = asdict(entry)
    default = PlannedConnection("", 0, 0, ())
    return {name: value for name, value in values.items() if name in required or value != getattr(default, name)}


def _model_plan(data: Mapping[str, Any]) -> ModelPlan:
    entries = []
    for entry in data["connections"]:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        entries.append(PlannedConnection(**values))
    # In plans of earlier versions both speeds were 1, or both the gate_speed.
    speeds = {"gate_speed": 1.0, "scale_speed": data["options"].get("gate_speed", 1.0)}
    options = {**speeds, **data["options"]}
    replace(Options().resolved, **options)  # an unknown or wrong option raises
    return ModelPlan(str(data["class"]), options, tuple(entries), data["structure"])


def merge(plans: Iterable[ModelPlan]) -> Plan:
    """Return one plan; equal ones, of several instances, once."""
    found: list[ModelPlan] = []
    for plan in plans:
        if plan not in found:
            found.append(plan)
    return Plan(tuple(found))
