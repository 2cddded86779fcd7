"""Which hyper-connections were computed: a record for each, written at every call of a graph.

A compiled graph gets the parameters of its sites as inputs, and equivalent blocks share one graph:
each call is counted for the hyper-connection whose phi is passed in. Records are weak: a copy of a
model starts at zero, and models and graphs can die.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

from mhc_compile.modules.hyper_connection import living

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mhc_compile.modules.hyper_connection import HyperConnection


class Record:
    """What happened to one hyper-connection in this process.

    Attributes:
        index: position of its site in its chain.
        computed: how often a compiled graph wrote its site.
        plain: how often the module that declares it ran outside of any graph.
        open: branches of the site that began in a graph and wait for their sum in a later one.
        dropped: how often its branch began in a graph, and no graph had its sum.
        computed_since: time of the first computed call, seconds since the epoch; None before.
        last_plain: time of the last plain run; None without one.
        graphs: the graphs that computed it: number by place ("file:line") and inner backend.
    """

    __slots__ = ("computed", "computed_since", "dropped", "graphs", "index", "last_plain", "open", "plain")

    def __init__(self, index: int) -> None:
        self.index = index
        self.computed = self.plain = self.dropped = self.open = 0
        self.computed_since: float | None = None
        self.last_plain: float | None = None
        self.graphs: Counter[tuple[str, str]] = Counter()

    def enter(self, graph: tuple[str, str]) -> None:
        """Record the first call of a graph that computes the site."""
        self.graphs[graph] += 1
        if self.computed_since is None:
            self.computed_since = time.time()


_records: weakref.WeakKeyDictionary[HyperConnection, Record] = weakref.WeakKeyDictionary()


def record_of(connection: HyperConnection) -> Record:
    """Return the record of a hyper-connection."""
    record = _records.get(connection)
    return _records.setdefault(connection, Record(connection.index)) if record is None else record


def ran_plain(connection: HyperConnection) -> bool:
    """Record a call of the module that declares `connection` outside of any graph.

    Return False, and record nothing, inside a branch that began on streams: its sum follows in a
    later graph.
    """
    record = record_of(connection)
    if record.open:
        return False
    record.plain += 1
    record.last_plain = time.time()
    return True


class GraphLedger:
    """The records of the sites of one compiled graph.

    Args:
        graph: place of the frame ("file:line") and name of the inner backend.
        inputs: position of phi among the inputs, and the hyper-connection that it had at the
            compilation, for each site and each branch that begins here.
        sites: for each site that the graph writes, the number of its entry in `inputs`.
    """

    def __init__(
        self, graph: tuple[str, str], inputs: Iterable[tuple[int, HyperConnection]], sites: Iterable[int]
    ) -> None:
        self.graph = graph
        self.inputs = tuple((position, record_of(connection)) for position, connection in inputs)
        self.sites = tuple((number, self.inputs[number][0]) for number in sites)
        self._known: dict[int, tuple[weakref.ref[Any], Record]] = {}

    def count(self, inputs: Sequence[Any]) -> None:
        """Count one call for every site. On the hot path: one look-up for each."""
        known = self._known
        for number, position in self.sites:
            phi = inputs[position]
            entry = known.get(id(phi))
            record = entry[1] if entry is not None and entry[0]() is phi else self.find(number, phi)
            record.computed += 1

    def find(self, number: int, phi: Any) -> Record:
        """Return the record for `phi`, passed in for entry `number`; by default the entry's own.

        FSDP passes another parameter object than the model has between calls, and a functional call
        any tensor.
        """
        entry = self._known.get(id(phi))
        if entry is not None and entry[0]() is phi:
            return entry[1]
        connection = next((one for one in living() if getattr(one, "phi", None) is phi), None)
        if connection is None:
            own = self.inputs[number][1]
            if self.graph not in own.graphs:
                own.enter(self.graph)
            return own
        record = record_of(connection)
        record.enter(self.graph)
        self._known[id(phi)] = weakref.ref(phi), record
        return record
