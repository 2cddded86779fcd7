"""`python -m mhc_compile.tools.scaling.page`: writes `bench/SCALING.md` from the estimates and from what `bench.predicted` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.tools.scaling.estimate import estimate
from mhc_compile.tools.scaling.shapes import SHAPES
from mhc_compile.tools.scaling.table import grid, markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MEASURED", "PAGE", "page"]

_BENCH = Path(__file__).parents[1] / "bench"
PAGE, MEASURED = _BENCH / "SCALING.md", _BENCH / "predicted.json"

_HEAD = """\
# What hyper-connections cost at scale

Written by `python -m mhc_compile.tools.scaling.page`; no number is typed. The estimates are those of `mhc scaling`, which has a row for a size of your
own (`--width --layers`) and other numbers of streams and mappings. They are counts and rooflines, nothing of these sizes was run."""

_READING = """\
## How to read it

- **Plain model**: a pre-norm decoder with gated feed-forward branches, traced on the meta device; its products and bytes are counted on its graph,
  as `mhc explain` does. Experts that a token runs through are taken as one wide branch: the products are the same, the bytes of sending tokens to
  experts and back are left out, and so is all communication. Both make the plain step look cheaper, and the overhead larger, than it is.
- **Parameters** are matrices without norms and routers. *Active*: what one token runs through, embedding and head included.
- **As lowered**: every operator of a site reads the streams again. **Floor**: everything of a site in one pass. A fused step comes near the
  floor on the CPU; between the two lie kernels that find the streams in a cache.
- **Kept**: bytes between forward and backward beyond the plain model's, with `recompute="cheap"` (the default) and `"block"`.
- **Overhead**: `FLOPs / F + bytes / B` of what is added over that of the plain model, for data sheets' F and B and bfloat16. A plain model that
  takes twice its roofline has half of the overhead. A backward pass is taken as twice a forward pass, recomputation is not counted."""

_CHECK = """\
## Held against measurements

The same formula with F and B measured on the machine (`torch.mm` and a copy), and forward and backward as `mhc bench` measures them, plain and ours
in turn, for its GPT-2-shaped model (`python -m mhc_compile.tools.bench.predicted`). Brackets: quartiles over rounds."""


def page(options: Options | None = None) -> str:
    """The whole page."""
    options = Options.parse(options)
    estimates = [estimate(shape, options) for shape in SHAPES]
    measured = json.loads(MEASURED.read_text())
    about = f"n = {options.streams}, mapping {options.mapping}; one sequence a pass, trunk and streams in bfloat16."
    sources = "\n".join(f"- {shape.name}: {shape.source}" for shape in SHAPES)
    parts = [
        _HEAD,
        about,
        markdown(estimates),
        f"Sizes are from:\n\n{sources}",
        _READING,
        _CHECK,
        _comparison(measured),
    ]
    return "\n\n".join(parts) + "\n"


def _comparison(measured: Sequence[dict[str, Any]]) -> str:
    rows = [
        "C|vocabulary|overhead measured|floor|as lowered|plain step measured|predicted|kept measured|predicted".split(
            "|"
        )
    ]
    for one in measured:
        shares = one["measured"]
        rows.append([
            str(one["width"]),
            f"{one['conditions']['vocabulary']:,}",
            f"{shares['median']:.1%} [{shares['low']:.1%}, {shares['high']:.1%}]",
            f"{one['floor']:.1%}",
            f"{one['lowered']:.1%}",
            f"{one['plain_measured']:.2f} s",
            f"{one['plain_predicted']:.2f} s",
            f"{one['kept_measured'] / 1e6:.1f} MB",
            f"{one['kept_predicted'] / 1e6:.1f} MB",
        ])  # fmt: skip
    c = measured[0]["conditions"]
    rates, widths = ([one[name] / 1e9 for one in measured] for name in ("flops", "bandwidth"))
    loads = [load for one in measured for load in one["conditions"]["load"]]
    conditions = (
        f"{c['device']}, {c['threads']} thread{'s' * (c['threads'] != 1)} of {c['cores']} cores, torch {c['torch']}, {c['dtype']},"
        f" {c['layers']} layers, {c['tokens']} tokens, {c['rounds']} rounds.\nF = {min(rates):.0f} to {max(rates):.0f} GFLOP/s,"
        f" B = {min(widths):.1f} to {max(widths):.1f} GB/s; load of the machine {min(loads):.1f} to {max(loads):.1f}."
    )
    return f"{grid(rows)}\n\n{conditions}"


if __name__ == "__main__":
    PAGE.write_text(page())
