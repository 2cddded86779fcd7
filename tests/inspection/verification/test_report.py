"""What a result looks like: on terminals of two widths, as JSON, and in which order."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mhc_compile.inspection.verification.results import CheckResult, Difference, OtherBatch, Seconds
from mhc_compile.reporting.base import render

SNAPSHOTS = Path(__file__).parent / "snapshots"


def tensor(group, name, relative, *, shape=(16, 8), magnitude=0.5, **more):
    return Difference(group, name, shape, "float32", magnitude, relative * magnitude, relative, 1e-5, **more)


SAME = (
    tensor("outputs", "output.logits", 3.1e-7, shape=(2, 16, 512), magnitude=2.0),
    *(tensor("gradients", f"transformer.h.{layer}.attn.c_attn.weight", 4e-7 / (layer + 1)) for layer in range(12)),
    tensor("gradients", "transformer.h.0.attn.k.bias", 8e-7, shape=(8,), magnitude=1e-9, floored=True),
    tensor("live: outputs", "output.logits", 2.2e-5, shape=(2, 16, 512), excused=True),
    tensor("live: gradients", "transformer.h.0.mhc.attn.scale", 1e-6, shape=(3,)),
    tensor("live: gradients", "temperature", 0.0, shape=()),
)
WRONG = (
    tensor("outputs", "output.logits", 2e-3, shape=(2, 16, 512), magnitude=2.0),
    tensor("gradients", "transformer.h.3.mlp.c_proj.weight", float("inf")),
    *SAME[2:],
)


def result(**changes):
    fields = {
        "model": "GPT2LMHeadModel",
        "mode": "train",
        "dtype": "float32",
        "inner_backend": "inductor",
        "seed": 0,
        "tolerance": 1e-5,
        "planned": 4,
        "sites": 4,
        "live": 4,
        "missed": {},
        "graphs": 1,
        "recompiles": 0,
        "other_batch": OtherBatch(4, 1),
        "own": False,
        "wider": "float64",
        "tensors": SAME,
        "warnings": (),
        "seconds": Seconds(0.012, 21.5, 0.0094),
    }
    return CheckResult(**(fields | changes))


RESULTS = {
    "same": (result(), False),
    "all": (result(), True),
    "wrong": (
        result(
            tensors=WRONG, live=3, recompiles=2, warnings=("streams end behind blocks.1 [x] (model.py:7)",), own=True
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", [80, 140])
def test_the_report_is_the_reviewed_one(name, width, request):
    shown, every = RESULTS[name]
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(render(shown, every=every))
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
    file = SNAPSHOTS / f"{name}-{width}.txt"
    if request.config.getoption("regenerate"):
        file.write_text(text)
    assert max(map(len, text.splitlines())) <= width
    assert text == file.read_text(), "if this is meant, write it again with pytest --regenerate"


def test_json_has_every_tensor_and_no_numbers_that_json_does_not_know():
    shown = result(tensors=WRONG)
    data = json.loads(json.dumps(shown.to_dict(), allow_nan=False))
    assert data["ok"] is False
    assert data["findings"] == list(shown.findings)
    assert len(data["tensors"]) == len(WRONG)
    missing = next(one for one in data["tensors"] if one["name"] == "transformer.h.3.mlp.c_proj.weight")
    assert (missing["relative"], missing["ok"]) == (None, False)
    assert data["other_batch"] == {"size": 4, "recompiles": 1}


def test_the_worst_of_a_group_is_one_that_deviates():
    excused, wrong = tensor("outputs", "a", 1e-2, excused=True), tensor("outputs", "b", 1e-3)
    (group,) = result(tensors=(excused, wrong)).groups
    assert (group.ok, group.worst.name) == (1, "b")
    assert result(tensors=(excused, wrong)).deviating == (wrong,)


def test_a_notebook_shows_the_report():
    html = result(tensors=WRONG)._repr_html_()
    assert html.startswith("<pre ")
    assert "transformer.h.3.mlp.c_proj.weight" in html
    assert "DIFFERS" in html
