"""`mhc_compile.rewrite`: hyper-connections for graph modules and exported programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import HyperConnections, container_of, find_connection
from mhc_compile.attachment.sites import check_options
from mhc_compile.compilation.bindings import PlannedSite, SiteParameters, bind_connection
from mhc_compile.compilation.messages import warn_nothing_rewritten
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import CaptureError
from mhc_compile.export.exported_program import rewrite_program
from mhc_compile.modules.gated import create_connection
from mhc_compile.passes import close_regions, expand_plan, normalize
from mhc_compile.passes.analysis.provenance import Provenance
from mhc_compile.passes.planning.planner import Planner
from mhc_compile.passes.transforms.outline_regions import adopt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes.transforms.stream_builder import Binding

    OptionsLike = Mapping[str, Any] | Options | None


@overload
def rewrite(model: fx.GraphModule, *args: Any, options: OptionsLike = None) -> fx.GraphModule: ...
@overload
def rewrite(model: ExportedProgram, *args: Any, options: OptionsLike = None) -> ExportedProgram: ...
def rewrite(
    model: fx.GraphModule | ExportedProgram, *args: Any, options: OptionsLike = None
) -> fx.GraphModule | ExportedProgram:
    """Return a copy of a graph module or exported program on parallel residual streams.

    Args:
        model: a graph module from `torch.fx.symbolic_trace`, or a program from
            `torch.export.export`, decomposed or not. It is not changed; the result shares its
            parameters and leaf modules.
        *args: example inputs for a graph module, tensors as for `model(*args)`. Only shapes and
            dtypes matter. A program knows its shapes, dynamic ones too, and takes none.
        options: as for `torch.compile(model, backend="mhc", options=options)`; `inner_backend`,
            `inductor` and `existing_optimizers` have no effect.

    Returns:
        A new object of the same kind; a rewritten one comes back as a copy. The hyper-connection of
        `blocks.0.attn` has the parameters `blocks.0.mhc.attn.phi`, `.bias` and `.scale`.

        A graph module has `mhc::` operators and a submodule `blocks.0.mhc.attn`; `torch.compile`
        accepts it with any backend.

        A program has ATen operations only: it is saved, loaded, decomposed, packaged and trained
        without this package. New parameters are in its state dict and signature; the rest of the
        signature is that of `model`.

    Raises:
        OptionError: the options are wrong.
        CaptureError: neither a graph module nor a program, or the example inputs do not fit.
        NothingRewrittenError: no residual add was found, and `strict` is set.
        AttachError: a module has another attribute `mhc`, or hyper-connections that contradict the
            options.
    """
    parsed = Options.parse(options)
    if isinstance(model, ExportedProgram):
        if args:
            raise CaptureError(
                f"rewrite takes no example inputs with an ExportedProgram, got {len(args)}: the program knows its"
                " shapes. Call rewrite(program, options=...)"
            )
        return rewrite_program(model, parsed)
    if not isinstance(model, fx.GraphModule):
        raise CaptureError(
            f"rewrite takes a torch.fx.GraphModule or a torch.export.ExportedProgram, got {type(model).__name__}."
            " Use torch.compile(model, backend='mhc') for a model; torch.fx.symbolic_trace(model) makes a graph module,"
            " torch.export.export(model, args) a program"
        )
    return _rewrite_graph_module(model, args, parsed)


def _rewrite_graph_module(
    graph_module: fx.GraphModule, args: tuple[Any, ...], options: ResolvedOptions
) -> fx.GraphModule:
    flat = normalize(graph_module.graph)
    source = fx.GraphModule(flat.owning_module or graph_module, flat, type(graph_module).__name__)
    _keep_connections(graph_module, source)
    _propagate(source, args)
    # With shapes, additions of tensors differ from additions of numbers.
    source.graph = normalize(source.graph)
    planner = Planner(source.graph, Provenance(), options.min_chain_length)
    parameters = AttributeParameters(source)
    bindings = {item.site: parameters.bind(item) for item in parameters.resolve(planner, options)}
    if not bindings and not any(node.target is torch.ops.mhc.update.default for node in source.graph.nodes):
        warn_nothing_rewritten(planner.plan.rejections, options)
    graph = expand_plan(source.graph, planner.plan, bindings) if bindings else close_regions(source.graph)
    adopt(source, graph)
    source.graph = graph
    source.recompile()
    return source


class AttributeParameters(SiteParameters):
    """The parameters of the sites of a graph module: its attributes, created if missing."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root

    def existing(self, planned: PlannedSite) -> HyperConnection | None:
        """Return the hyper-connection at the path of the site."""
        return find_connection(self.root.get_submodule(planned.site.owner.path), planned.site)

    def bind(self, planned: PlannedSite) -> Binding:
        """Return the paths of the site's parameters."""
        site, connection = planned.site, self.existing(planned)
        if connection is None:
            device = planned.value.device
            connection = create_connection(
                site.width, planned.options, index=planned.index, last=planned.last, device=device, dtype=planned.dtype
            )
            container_of(self.root.get_submodule(site.owner.path)).put(site.name, connection)
        check_options(connection, site, planned.options)
        if planned.last:
            connection.end_chain()
        binding = bind_connection(connection, lambda name: f"{site.path}.{name}")
        assert binding is not None  # every name is a path
        return binding


def _keep_connections(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Copy hyper-connections to `new`, which has only the parameters that its graph reads."""
    for path, module in old.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, HyperConnections) and not isinstance(old.get_submodule(parent), HyperConnections):
            if parent and parent not in dict(new.named_modules(remove_duplicate=False)):
                new.add_submodule(parent, nn.Module())
            new.get_submodule(parent).add_module(name, module)


def _propagate(graph_module: fx.GraphModule, args: tuple[Any, ...]) -> None:
    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        FakeTensorProp(graph_module, mode).propagate(*args)
    except Exception as error:
        shown = ", ".join(str(list(arg.shape)) if isinstance(arg, torch.Tensor) else type(arg).__name__ for arg in args)
        raise CaptureError(
            f"the example inputs ({shown}) do not fit the graph module:"
            f" {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
