"""What a `torch.export.ExportedProgram` knows beside its graph: which modules its nodes come from, and which parameters are theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from mhc_compile.connection import HyperConnection
from mhc_compile.errors import AttachError
from mhc_compile.passes import Binding, ModuleRef, Plan, Provenance, Refusal, Site
from mhc_compile.passes.roles import tensor_value
from mhc_compile.study import width_conflict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    from mhc_compile.options import Options

__all__ = ["ProgramParameters", "ProgramProvenance", "root_kind"]


class ProgramProvenance(Provenance):
    """Provenance of the graph of an exported program: module paths from `nn_module_stack`, parameters from the signature.

    Args:
        graph: of the program, or a copy.
        inputs: specs of the graph's placeholders, in order.
    """

    def __init__(self, graph: Graph, inputs: Iterable[InputSpec]) -> None:
        # Placeholders keep their target through every copy of the graph.
        named = [
            (str(node.target), spec) for node, spec in zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
        ]
        self._targets = {name: spec.target for name, spec in named if spec.kind is InputKind.PARAMETER}
        self._held = {name for name, spec in named if spec.kind is not InputKind.USER_INPUT}

    def stack(self, node: Node) -> tuple[ModuleRef, ...]:
        """The root, then the modules whose calls surround `node`."""
        # Some versions write the second call of a module as "h.0@1".
        return tuple(replace(ref, path=ref.path.partition("@")[0]) for ref in super().stack(node))

    def parameter_name(self, node: Node) -> str | None:
        """Path of the parameter behind a graph input."""
        return self._targets.get(str(node.target)) if node.op == "placeholder" else None

    def holds_weights(self, node: Node) -> bool:
        """Whether `node` is a graph input that the program brings along: a parameter, a buffer or a constant."""
        return node.op == "placeholder" and str(node.target) in self._held


class ProgramParameters:
    """The parameters of the hyper-connections of a program, those that it has and those that it gets.

    A program that was exported from a model with hyper-connections attached has them among its inputs, unread: they are used.

    Args:
        graph: the normalised graph; `bind` adds inputs to it.
        program: the program that it comes from.
        options: number of streams, mapping and start.
    """

    def __init__(self, graph: Graph, program: ExportedProgram, options: Options) -> None:
        self.graph = graph
        self.options = options
        #: Sites that cannot share the parameters of their module.
        self.vetoes: dict[Node, Refusal] = {}
        #: State dict entries that are new, by path.
        self.tensors: dict[str, nn.Parameter] = {}
        self._specs = list(program.graph_signature.input_specs)
        self._nodes = {spec.target: node for node, spec in _inputs(graph, program) if spec.kind is InputKind.PARAMETER}
        self._state = program.state_dict
        self._aliases = {path: names for names in _aliases(program) for path in names}

    @property
    def in_use(self) -> bool:
        """Whether the program reads parameters of hyper-connections already: it has been rewritten."""
        for name, node in self._nodes.items():
            path, _, part = str(name).rpartition(".")
            siblings = all(f"{path}.{other}" in self._nodes for other in ("bias", "scale"))
            if part == "phi" and "mhc" in path.split(".") and siblings and node.users:
                return True
        return False

    def claim(self, plan: Plan) -> bool:
        """Checks that every site of the plan can have the parameters at its path. Returns whether one cannot, so that a new plan is needed.

        Raises:
            AttachError: the owner of a site has something else called `mhc`, or its hyper-connection contradicts the options.
        """
        before = len(self.vetoes)
        claimed: dict[str, HyperConnection] = {}
        for site in plan.sites:
            path = self._path(site)
            connection = claimed.setdefault(path, self._existing(site, path) or self._like(site.width))
            if connection.width != site.width:
                self.vetoes[site.add] = width_conflict(site, connection)
        return len(self.vetoes) > before

    def bind(self, plan: Plan) -> tuple[dict[Site, Binding], list[InputSpec]]:
        """Parameters for every site of the plan, as inputs of the graph, and the specs of all inputs of the graph."""
        bindings = {}
        for chain in plan.chains:
            for index, site in enumerate(chain.sites):
                path = self._path(site)
                if f"{path}.phi" not in self._state and f"{path}.phi" not in self.tensors:
                    self._create(site, path, index)
                phi, bias, scale = (self._input(f"{path}.{part}") for part in ("phi", "bias", "scale"))
                o = self.options
                bindings[site] = Binding(phi, bias, scale, o.streams, o.mapping, o.iterations, o.eps)
        return bindings, self._specs

    def _path(self, site: Site) -> str:
        """Where the parameters of `site` are. A module that the model holds under several names is one module: its first name counts."""
        owner = self._aliases.get(site.owner.path, [site.owner.path])[0]
        return ".".join(part for part in (owner, "mhc", site.name) if part)

    def _existing(self, site: Site, path: str) -> HyperConnection | None:
        container = path.removesuffix(f".{site.name}")
        inside = [name for name in self._state if name == container or name.startswith(f"{container}.")]
        foreign = [name for name in inside if name.rpartition(".")[2] not in {"phi", "bias", "scale"}]
        if foreign:
            raise AttachError(
                f"{site}: the program has an entry {foreign[0]!r} of its own; hyper-connections need the name {container!r}."
                " Rename the attribute of the model and export it again"
            )
        if f"{path}.phi" not in self._state:
            return None
        has = {part: list(self._state[f"{path}.{part}"].shape) for part in ("phi", "bias", "scale")}
        connection = self._like(max(1, has["phi"][0] // self.options.streams))
        wants = {part: list(parameter.shape) for part, parameter in connection.named_parameters()}
        if has != wants:
            raise AttachError(
                f"{site}: its hyper-connection has phi {has['phi']} and bias {has['bias']}; streams={self.options.streams} and"
                f" mapping={self.options.mapping!r} need [{self.options.streams} C, {wants['bias'][0]}] and {wants['bias']}."
                " Rewrite with the options that the model was attached with"
            )
        return connection

    def _like(self, width: int) -> HyperConnection:
        """The shapes of a hyper-connection, without memory."""
        return HyperConnection(width, self.options, device="meta")

    def _create(self, site: Site, path: str, index: int) -> None:
        value = tensor_value(site.add)
        assert value is not None
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        connection = HyperConnection(site.width, self.options, index=index, device=value.device, dtype=dtype)
        _, *others = self._aliases.get(site.owner.path, [site.owner.path])
        for owner in others:  # a state dict has shared tensors under every name
            for part, parameter in connection.named_parameters():
                self.tensors[f"{owner}.mhc.{site.name}.{part}"] = parameter
        for part, parameter in connection.named_parameters():
            self.tensors[f"{path}.{part}"] = parameter

    def _input(self, target: str) -> Node:
        """The graph input that is this parameter, behind all other parameters if it is new."""
        if target not in self._nodes:
            behind = [i for i, spec in enumerate(self._specs) if spec.kind in {InputKind.TOKEN, InputKind.PARAMETER}]
            place = behind[-1] + 1 if behind else 0
            following = [node for node in self.graph.nodes if node.op == "placeholder"][place:]
            with self.graph.inserting_before(following[0] if following else next(iter(self.graph.nodes))):
                node = self.graph.placeholder("p_" + target.replace(".", "_"))
                node.target = node.name  # an argument of the graph's code; a module's name may be anything without dots
            node.meta["val"] = self._fake(self.tensors.get(target, self._state.get(target)))
            self._specs.insert(place, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
            self._nodes[target] = node
        return self._nodes[target]

    def _fake(self, parameter: nn.Parameter) -> torch.Tensor:
        modes = (getattr(tensor_value(node), "fake_mode", None) for node in self.graph.nodes)
        mode = next(mode for mode in modes if mode is not None)
        return mode.from_tensor(parameter, static_shapes=True)  # type: ignore[no-any-return]


def _inputs(graph: Graph, program: ExportedProgram) -> list[tuple[Node, InputSpec]]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return list(zip(placeholders, program.graph_signature.input_specs, strict=True))


def _aliases(program: ExportedProgram) -> list[list[str]]:
    """Paths of the modules with tensors, those that hold the very same tensors together, in the order in which the program names them."""
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
    """Class of the module that the program was exported from."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in program.graph.nodes)
    roots = (kind for stack in stacks for path, kind in stack.values() if not path)
    kind = next(roots, "ExportedProgram")
    return getattr(kind, "__name__", str(kind).rpartition(".")[2])
