"""Counts and reports what is rewritten below `mhc run`, in the script and its children."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile._torch.default_backend import captured_graphs
from mhc_compile.tools.launcher.training import Training

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType
    from typing import Any

    from torch import nn

    from mhc_compile.compilation.session import GraphSession
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.tools.launcher.run_config import RunConfig


@dataclass(frozen=True)
class Graph:
    """One compiled graph."""

    pid: int  # the process
    model: int  # number of the compiled model in its process
    kind: str  # class of the model, or name of the function if there is no module
    connections: int  # hyper-connections seen in this graph first
    skipped: int  # additions not rewritten, less those counted for this code and model before


class ReportCounter:
    """Counts the graphs that this process compiles with mhc.

    The first model of a class is reported at once, because a run that is killed never ends; the
    total is reported at the end. Children append their graphs to a file for the script as they go,
    because many never run their exit handlers.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.graphs: list[Graph] = []
        self._connections: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
        self._models: weakref.WeakKeyDictionary[nn.Module | CodeType, int] = weakref.WeakKeyDictionary()
        self._given: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._training: dict[int, Training] = {}  # by process
        self._skipped: weakref.WeakKeyDictionary[nn.Module | CodeType, Counter[CodeType]] = weakref.WeakKeyDictionary()

    def add_model(self, model: nn.Module) -> None:
        """Count a model that has hyper-connections before it is compiled."""
        self._given.add(model)

    def models(self) -> list[nn.Module]:
        """Return the models with hyper-connections, without those inside others."""
        from torch import nn

        found = {*self._given, *(model for model in self._models if isinstance(model, nn.Module))}
        inner = {part for model in found for part in model.modules() if part is not model}
        return [model for model in found if model not in inner]

    def add_training(self, training: Training) -> None:
        """Keep the latest summary of this process, for the report or for the parent."""
        self._training[os.getpid()] = training
        if os.getpid() != self.config.pid:
            self._append({"pid": os.getpid(), "training": asdict(training)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        with open(self.config.reports, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")  # one write: lines of several children stay whole

    def count(self, study: GraphSession) -> None:
        """Count one graph, while Dynamo traces it: sites are bound and nothing is rewritten yet."""
        from mhc_compile import _torch
        from mhc_compile.attachment.model_tree import find_connection

        code = _torch.frame_code()
        root = study.provenance.root
        model: nn.Module | CodeType = code if root is None else root
        new, form = 0, ""
        for site in study.plan.sites:
            owner = study.provenance.module(site.owner)
            connection = find_connection(owner, site) if owner is not None else None
            if connection is not None and connection not in self._connections:
                self._connections.add(connection)
                new += 1
                preset = f"preset {connection.preset}, " if connection.preset != "paper" else ""
                form = f"{preset}streams {connection.streams}, mapping {connection.mapping}"
        # A graph that is compiled again, for other shapes, has the same additions.
        skipped = self._skipped.setdefault(model, Counter())
        more = max(0, len(study.plan.rejections) - skipped[code])
        skipped[code] += more
        number = self._models.setdefault(model, len(self.graphs))
        kind = f"{code.co_name}()" if root is None else _torch.plain_class(_torch.without_wrappers(root)).__name__
        graph = Graph(os.getpid(), number, kind, new, more)
        first = new > 0 and not any(one.kind == kind and one.connections for one in self.graphs)
        self.graphs.append(graph)
        if graph.pid != self.config.pid:
            self._append(asdict(graph))
        if first:
            self._print(f"{kind}: {_number(new, 'hyper-connection')}, {_number(more, 'addition')} skipped ({form})")

    def report_total(self) -> None:
        """Report what was rewritten in all, or why nothing was. Children report nothing here."""
        if os.getpid() != self.config.pid:
            return
        graphs = [*self.graphs, *self._children()]
        if (
            self.config.plan is not None
            and not self._given
            and not any(pid != self.config.pid for pid in self._training)
        ):
            self._print(f"{self.config.plan} was used by no model: none of its classes was constructed")
        rewritten = {(graph.pid, graph.model): graph.kind for graph in graphs if graph.connections}
        if not rewritten:
            if not hasattr(sys, "last_type"):  # an exception ended the script, and must be the last to be read
                self._print(f"nothing was rewritten: {self.why_nothing(len(graphs))}")
        elif len([graph for graph in graphs if graph.connections or graph.skipped]) > 1:
            kinds = Counter(rewritten.values()).items()
            models = ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds)
            processes = len({pid for pid, _ in rewritten})
            where = f" in {processes} processes" if processes > 1 else ""
            found = _number(sum(graph.connections for graph in graphs), "hyper-connection")
            # Additions of models without hyper-connections do not count.
            skipped = sum(graph.skipped for graph in graphs if (graph.pid, graph.model) in rewritten)
            self._print(f"in all {found} ({models}){where}, {_number(skipped, 'addition')} skipped")
        for training in list(self._training.values())[:1]:  # the processes of a group do the same
            if training.sentence():
                self._print(training.sentence())

    def _children(self) -> list[Graph]:
        """Return the graphs of all children, and delete their file."""
        file = Path(self.config.reports)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        entries = [json.loads(line) for line in lines]
        self._training.update({e["pid"]: Training(**e["training"]) for e in entries if "training" in e})
        return [Graph(**entry) for entry in entries if "training" not in entry]

    def why_nothing(self, graphs: int | None = None) -> str:
        """Return why no model was rewritten."""
        script = self.config.script
        graphs = len(self.graphs) if graphs is None else graphs
        if graphs:
            return (
                f"{script} compiled {_number(graphs, 'graph')} with mhc, and none has"
                " residual adds that can be rewritten. `mhc explain` shows each addition with its reason"
            )
        if captured_graphs():
            return (
                f"{script} names a backend in every torch.compile(...) that it runs, and mhc run does not replace it. Leave"
                " backend= out, write backend='mhc', or add --replace-inductor"
            )
        return self.config.never_compiled.partition(": ")[2].partition(": ")[2]

    def _print(self, message: str) -> None:
        """Write a line to stderr, in one process of a torchrun group."""
        if (
            self.config.quiet
            or self.config.plan_output is not None
            or os.environ.get("RANK", "0") != "0"
            or sys.__stderr__ is None
        ):
            return
        with contextlib.suppress(OSError, ValueError):  # the script closed it, or its reader has gone
            sys.__stderr__.write(f"mhc run: {message.removeprefix('mhc run: ')}\n")
            sys.__stderr__.flush()


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count != 1 else ''}"
