"""`python -m mhc_compile.tools.bench.predicted FILE`: the cost model of `mhc explain` and `mhc scaling` against measured steps.

The model's two constants are measured on this machine, with as many threads as the steps: arithmetic as `torch.mm` of a
feed-forward branch, bandwidth as a copy that no cache holds. Then the overhead of forward and backward that follows from
them is put beside the one that `mhc bench` measures. The optimizer is left out of both: the model does not know it. Plain
and ours are timed in turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.inspection.explain.explain import explain
from mhc_compile.inspection.roofline import Machine, Work
from mhc_compile.reporting.progress import Silent
from mhc_compile.tools.bench.model import PlainModel, batch
from mhc_compile.tools.bench.names import PLAIN
from mhc_compile.tools.bench.run import Request, run
from mhc_compile.tools.bench.shape import Shape
from mhc_compile.tools.bench.spread import Spread, paired_ratio
from mhc_compile.tools.scaling.kept import kept_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.tools.bench.result import Row

__all__ = ["Comparison", "compare", "main", "this_machine"]

#: C and vocabulary.
SIZES = ((256, 50257), (768, 50257))
#: Elements of the buffer that is copied: 256 MiB in float32, more than any cache.
_LARGE = 1 << 26


@dataclass(frozen=True)
class Comparison:
    """One size. Overheads are shares of the plain model's forward and backward.

    Attributes:
        width: C.
        flops: of `torch.mm`, per second.
        bandwidth: bytes per second of a copy, read and written.
        plain_predicted: seconds of the plain model's forward and backward.
        plain_measured: the same.
        floor: the overhead if every site moved the bytes that it must.
        lowered: the overhead with the bytes that the cost model assumes.
        measured: median and quartiles over rounds.
        kept_predicted: bytes that all sites keep for the backward beyond the plain model.
        kept_measured: the same.
        conditions: one line of it.
    """

    width: int
    flops: float
    bandwidth: float
    plain_predicted: float
    plain_measured: float
    floor: float
    lowered: float
    measured: Spread
    kept_predicted: int
    kept_measured: int
    conditions: dict[str, Any]


def this_machine(width: int, tokens: int) -> Machine:
    """Its figures in float32, with torch's threads as they are set."""
    left, right = torch.randn(tokens, width), torch.randn(width, 4 * width)
    out = torch.empty(tokens, 4 * width)
    products = 2 * tokens * width * 4 * width / _median(lambda: torch.mm(left, right, out=out))
    source, target = torch.zeros(_LARGE), torch.zeros(_LARGE)
    bandwidth = 2 * 4 * _LARGE / _median(lambda: target.copy_(source))
    return Machine("this machine", "float32", 4, products, bandwidth, "measured: torch.mm and a copy")


def _median(call: Callable[[], object], repeats: int = 15) -> float:
    call()
    spans = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spans.append(time.perf_counter() - begin)
    return statistics.median(spans)


def compare(shape: Shape, *, rounds: int = 15, cold: bool = True) -> Comparison:
    """Predicts and measures the model of one shape on the CPU, in float32. `cold`: compile from empty caches."""
    width = shape.width
    machine = this_machine(width, shape.tokens)
    explanation = explain(PlainModel(shape), *batch(shape))
    plain = explanation.plain
    assert plain is not None
    result = run(Request(shape=shape, only=(PLAIN, "ours"), kinds=("step",), rounds=rounds, cold=cold), Silent())
    rows = {row.name: row for row in result.benchmarks[0].rows}
    base, ours = rows[PLAIN], rows["ours"]
    assert base.saved_bytes is not None
    assert ours.saved_bytes is not None
    alone, both = (_passes(row) for row in (base, ours))
    ratio = paired_ratio(both, alone)
    per_token = kept_bytes(width, shape.real.itemsize, explanation.options, shape.sites, "cheap")
    seconds = 3 * machine.seconds(plain)

    def share(more: Work) -> float:
        return 3 * machine.seconds(more) / seconds

    return Comparison(
        width=width,
        flops=machine.flops,
        bandwidth=machine.bandwidth,
        plain_predicted=seconds,
        plain_measured=statistics.median(alone),
        floor=share(explanation.floor),
        lowered=share(explanation.added),
        measured=Spread(ratio.median - 1, ratio.low - 1, ratio.high - 1),
        kept_predicted=per_token * shape.tokens,
        kept_measured=ours.saved_bytes - base.saved_bytes,
        conditions=asdict(result.conditions),
    )


def _passes(row: Row) -> list[float]:
    """Seconds of forward and backward, round by round."""
    if row.status != "ok":
        raise RuntimeError(f"{row.name}: {row.status}: {row.message}")
    return [sum(pair) for pair in zip(row.samples["forward"], row.samples["backward"], strict=True)]


def main() -> None:
    """Compares at every size and writes the file that is named."""
    if len(sys.argv) != 2:
        sys.exit("python -m mhc_compile.tools.bench.predicted FILE.json")
    measured = [asdict(compare(Shape(width=width, vocabulary=vocabulary))) for width, vocabulary in SIZES]
    Path(sys.argv[1]).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
