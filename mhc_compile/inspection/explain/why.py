"""`mhc_compile.why`: finds the adds that a name stands for, and tells their stories."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.compilation.dry_run import DryGraph, dry_run
from mhc_compile.config.options import Options
from mhc_compile.errors import UnknownAddError
from mhc_compile.export.exported_program import plan_program
from mhc_compile.export.program_parameters import ProgramProvenance
from mhc_compile.inspection.explain.story import RejectionStory, SiteStory, Story
from mhc_compile.inspection.explain.storytelling import Teller

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["why"]


def why(
    model: nn.Module | ExportedProgram,
    *args: Any,
    node: str,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Story:
    """The full story of one add, or of several that share a name: why it becomes a hyper-connection, or why it does not. Nothing is run or changed.

    Args:
        model: as for `explain`.
        *args: example inputs, as for `model(*args, **kwargs)`. A program has its own, and needs none.
        node: the name of an operation in the graph ("add_3"; one that is no add stands for the site in whose branch it is), the path of a site
            ("h.0.mhc.attn"), the path of a module ("h.0": all adds that it or a module below it performs; "h.0.attn", which performs none and ends
            a branch: the site of that branch), or "file.py:12".
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Raises:
        UnknownAddError: nothing has that name.
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs.
    """
    parsed = Options.parse(options)
    search = _Search(node)
    if isinstance(model, ExportedProgram):
        found = plan_program(model, parsed)
        graph, plan = found.graph, found.plan
        search.look(Teller(graph, plan, ProgramProvenance(graph, model.graph_signature.input_specs), parsed))
        return search.story()

    def on_graph(dry: DryGraph) -> None:
        for number, module in enumerate(dry.modules):
            search.look(Teller(dry.session.graph, dry.session.plan, dry.session.provenance, parsed, module, number))

    dry_run(unwrap(model), args, kwargs, parsed, on_graph)
    return search.story()


class _Search:
    """Goes through the verdicts of all graphs of a model."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.sites: list[SiteStory] = []
        self.rejections: list[RejectionStory] = []
        self.around: list[SiteStory] = []
        self.names: dict[str, None] = {}

    def look(self, teller: Teller) -> None:
        """The verdicts on one graph."""
        for site, told in teller.sites():
            self.names.update(dict.fromkeys((*told.names, told.owner, *_lines(told))))
            if self._means(told, told.owner):
                self.sites.append(told)
            elif self.asked == told.declaring_module or self.asked in {node.name for node in site.branch}:
                self.around.append(told)
        for _, rejection in teller.rejections():
            self.names.update(dict.fromkeys((*rejection.names, rejection.module, *_lines(rejection))))
            if self._means(rejection, rejection.module):
                self.rejections.append(rejection)

    def story(self) -> Story:
        """What was found.

        Raises:
            UnknownAddError: nothing was.
        """
        if self.sites or self.rejections:
            return Story(self.asked, tuple(self.sites), tuple(self.rejections))
        if self.around:
            return Story(self.asked, tuple(self.around), ())
        names = [name for name in self.names if name]
        near = difflib.get_close_matches(self.asked, names, n=5, cutoff=0.5) or names[:5]
        known = f"near names: {', '.join(near)}" if near else "the model has no addition of floating-point tensors"
        raise UnknownAddError(
            f"no addition is called {self.asked!r}, and no module or line of that name performs one; {known}. Expected the name of an operation,"
            " the path of a site or of a module, or file.py:LINE; `mhc explain --all` lists them"
        )

    def _means(self, told: SiteStory | RejectionStory, module: str) -> bool:
        asked = self.asked
        if asked in told.names or (asked and f"{module}.".startswith(f"{asked}.")):
            return True
        file, colon, line = asked.rpartition(":")
        if not colon or not line.isdigit():
            return False
        return any(f"/{add.source}".endswith(f"/{file.removeprefix('./')}:{line}") for add in told.adds)


def _lines(told: SiteStory | RejectionStory) -> list[str]:
    return [os.path.basename(add.source) for add in told.adds if add.source]
