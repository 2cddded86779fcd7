"""Provenance and site parameters of a `torch.export.ExportedProgram`, from its signature."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from mhc_compile.attachment.model_tree import CONTAINER
from mhc_compile.capture.shared_graphs import below
from mhc_compile.compilation.bindings import PlannedSite, SiteParameters, bind_connection, bound_names
from mhc_compile.errors import AttachError
from mhc_compile.modules.gated import GatedConnection, create_connection
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.modules.readout import ReadOut
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    from mhc_compile.passes.transforms.stream_builder import Binding


#: The parameters of each kind of hyper-connection.
_KINDS = (HyperConnection.names, GatedConnection.names)


class ProgramProvenance(Provenance):
    """Maps nodes of a program to modules (`nn_module_stack`) and parameters (the signature)."""

    def __init__(self, graph: Graph, inputs: Iterable[InputSpec]) -> None:
        # Placeholders keep their target through every copy of the graph.
        named = [
            (str(node.target), spec) for node, spec in zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
        ]
        self._targets = {name: spec.target for name, spec in named if spec.kind is InputKind.PARAMETER}
        self._held = {name for name, spec in named if spec.kind is not InputKind.USER_INPUT}

    def stack(self, node: Node) -> tuple[ModuleRef, ...]:
        """Return the root, then the modules whose calls surround `node`."""
        # Some versions write the second call of a module as "h.0@1".
        return tuple(replace(ref, path=ref.path.partition("@")[0]) for ref in super().stack(node))

    def parameter_name(self, node: Node) -> str | None:
        """Return the path of the parameter that a graph input is."""
        return self._targets.get(str(node.target)) if node.op == "placeholder" else None

    def holds_weights(self, node: Node) -> bool:
        """Whether `node` is a parameter, buffer or constant of the program."""
        return node.op == "placeholder" and str(node.target) in self._held


class ProgramParameters(SiteParameters):
    """The parameters of a program's hyper-connections.

    A program exported from a model with hyper-connections has them as unread inputs, which are
    used. Others are created; `bind` adds them to the graph, a normalised copy of the program's.
    """

    def __init__(self, graph: Graph, program: ExportedProgram) -> None:
        self.graph = graph
        #: New state dict entries, by path.
        self.tensors: dict[str, nn.Parameter] = {}
        #: Specs of all graph inputs, in order.
        self.specs = list(program.graph_signature.input_specs)
        placeholders = zip(graph.find_nodes(op="placeholder"), self.specs, strict=True)
        self._nodes: dict[Any, Node] = {
            spec.target: node for node, spec in placeholders if spec.kind is InputKind.PARAMETER
        }
        self._state = program.state_dict
        self._aliases = {path: names for names in _aliases(program) for path in names}

    @property
    def in_use(self) -> bool:
        """Whether the program reads hyper-connections, so that it was rewritten before."""
        for name in self._nodes:
            path, _, part = str(name).rpartition(".")
            kinds = ([self._nodes.get(f"{path}.{other}") for other in names] for names in _KINDS)
            # Static coefficients do not read phi.
            used = any(all(nodes) and any(other.users for other in nodes if other is not None) for nodes in kinds)
            if part == "phi" and CONTAINER in path.split(".") and used:
                return True
        return False

    def existing(self, planned: PlannedSite) -> HyperConnection | None:
        """Return a hyper-connection on the meta device, with the shapes that the program has."""
        site, path = planned.site, self.path(planned)
        container = path.removesuffix(f".{site.name}")
        inside = [name for name in self._state if name == container or name.startswith(f"{container}.")]
        foreign = [name for name in inside if not _is_part(name)]
        if foreign:
            raise AttachError(
                f"{site}: the program has an entry {foreign[0]!r} of its own; hyper-connections need the name"
                f" {container!r}. Rename the attribute of the model and export it again"
            )
        if f"{path}.phi" not in self._state:
            return None
        options = planned.options
        rows = self._state[f"{path}.phi"].shape[0]
        connection = create_connection(max(1, rows // options.streams), options, device="meta")
        wants = {part: list(getattr(connection, part).shape) for part in connection.names}
        has = {part: list(self._state[f"{path}.{part}"].shape) for part in wants if f"{path}.{part}" in self._state}
        if has != wants:
            raise AttachError(
                f"{site}: its hyper-connection has {_shown(has)}; streams={options.streams} and"
                f" mapping={options.mapping!r} need {_shown(wants)}. Rewrite with the options that the model was"
                " attached with"
            )
        return connection

    def bind(self, planned: PlannedSite) -> Binding:
        """Return the graph inputs of the site's parameters, added if missing."""
        path = self.path(planned)
        like = create_connection(planned.site.width, planned.options, last=planned.last, device="meta")
        names = [f"{path}.{part}" for part in bound_names(like)]
        if any(name not in self._state and name not in self.tensors for name in names):
            self._create(planned, path)
        binding = bind_connection(like, lambda part: self._input(f"{path}.{part}"))
        assert binding is not None  # inputs are made for parameters that have none
        return binding

    def path(self, planned: PlannedSite) -> str:
        """Return the path of a site's parameters, below the first name of a shared module."""
        owner = planned.site.owner.path
        return below(self._aliases.get(owner, [owner])[0], f"{CONTAINER}.{planned.site.name}")

    def _create(self, planned: PlannedSite, path: str) -> None:
        site = planned.site
        connection = create_connection(
            site.width,
            planned.options,
            index=planned.index,
            last=planned.last,
            device=planned.value.device,
            dtype=planned.dtype,
        )
        new = [(part, p) for part, p in connection.named_parameters() if f"{path}.{part}" not in self._state]
        # A state dict has shared tensors under every name; `path` comes last.
        _, *others = self._aliases.get(site.owner.path, [site.owner.path])
        for prefix in (*(f"{owner}.{CONTAINER}.{site.name}" for owner in others), path):
            self.tensors.update((f"{prefix}.{part}", parameter) for part, parameter in new)

    def _input(self, target: str) -> Node:
        """Return the graph input of this parameter; a new one comes after all other parameters."""
        if target not in self._nodes:
            known = [i for i, spec in enumerate(self.specs) if spec.kind in {InputKind.TOKEN, InputKind.PARAMETER}]
            place = known[-1] + 1 if known else 0
            following = [node for node in self.graph.nodes if node.op == "placeholder"][place:]
            with self.graph.inserting_before(following[0] if following else next(iter(self.graph.nodes))):
                node = self.graph.placeholder("p_" + target.replace(".", "_"))
                # An argument name of the graph's code; a module's name may be anything.
                node.target = node.name
            modes = (getattr(tensor_value(other), "fake_mode", None) for other in self.graph.nodes)
            mode: Any = next(mode for mode in modes if mode is not None)
            parameter = self.tensors.get(target, self._state.get(target))
            node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
            self.specs.insert(place, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
            self._nodes[target] = node
        return self._nodes[target]


def _aliases(program: ExportedProgram) -> list[list[str]]:
    """Return the paths of modules with tensors, grouped by identical contents, in program order."""
    contents: dict[str, list[tuple[str, int]]] = {}
    for name, tensor in program.state_dict.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            contents.setdefault(".".join(parts[:depth]), []).append((".".join(parts[depth:]), id(tensor)))
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for path, tensors in contents.items():
        groups.setdefault(tuple(sorted(tensors)), []).append(path)
    return list(groups.values())


def root_kind(program: ExportedProgram) -> str:
    """Return the class name of the module that the program was exported from."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in program.graph.nodes)
    roots = (kind for stack in stacks for path, kind in stack.values() if not path)
    kind = next(roots, "ExportedProgram")
    return getattr(kind, "__name__", str(kind).rpartition(".")[2])


def _shown(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _is_part(name: str) -> bool:
    """Whether this may be the path of a parameter of a hyper-connection or its read-out."""
    path, _, part = name.rpartition(".")
    kinds = ReadOut.NAMES.values() if path.endswith(".read_out") else _KINDS
    return any(part in names for names in kinds)
