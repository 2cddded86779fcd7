"""What a run of the passes logs, and what it writes to torch's structured trace."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers.graphs import planned
from torch import fx, nn

from mhc_compile.passes import NORMALIZE, normalize, run_passes

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)
    def forward(self, x):
        return x + self.f(x)

model = nn.Sequential(Block(), Block())
print(torch.compile(model, backend="mhc", options={"inner_backend": "eager"})(torch.randn(2, 8)).shape)
"""


def run(tmp_path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    command = [sys.executable, "-c", MODEL]
    return subprocess.run(
        command, env={**environment, **settings}, cwd=tmp_path, capture_output=True, text=True, check=True
    )


def lines(records: list[logging.LogRecord], start: str) -> list[str]:
    return [text for record in records if (text := record.getMessage()).startswith(start)]


def test_torch_logs_shows_every_pass_and_plan(tmp_path):
    out = run(tmp_path, TORCH_LOGS="+mhc_compile").stderr
    passes = re.findall(r"pass ([\w-]+): (\d+) nodes before, (\d+) after, [\d.]+ ms", out)
    names = [name for name, *_ in passes]
    assert names[:4] == [step.name for step in NORMALIZE]
    assert {"expand-streams", "outline-regions"} <= set(names)
    before, after = next((int(before), int(after)) for name, before, after in passes if name == "expand-streams")
    assert after > before > 0
    assert "plan: 2 sites in 1 chains, 0 additions rejected (none)" in out


def test_nothing_is_logged_by_default(tmp_path):
    assert "pass " not in run(tmp_path).stderr


def test_structured_trace_holds_the_graphs_around_each_pass(tmp_path):
    run(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    (trace,) = (tmp_path / "trace").iterdir()
    artifacts: dict[str, str] = {}
    name = None
    for line in trace.read_text().splitlines():
        if line.startswith("\t"):
            artifacts[name] += line.removeprefix("\t") + "\n"
        else:
            record = json.loads(line[line.index("{") :])
            name = record.get("artifact", {}).get("name", "")
            artifacts[name] = ""  # attaching restarts the trace: the last one counts
    assert "torch.ops.mhc" not in artifacts["mhc_expand-streams_before"]
    assert artifacts["mhc_expand-streams_after"].count("torch.ops.mhc.update") == 2
    plan = json.loads(artifacts["mhc_plan"])
    assert [len(chain) for chain in plan["chains"]] == [2]
    assert plan["rejections"] == []


def test_a_pass_logs_its_nodes(caplog):
    with caplog.at_level(logging.DEBUG, logger="mhc_compile"):
        graph = fx.symbolic_trace(nn.Linear(2, 2)).graph
        assert normalize(graph) is not graph
    messages = lines(caplog.records, "pass ")
    assert [message.split(":")[0] for message in messages] == [f"pass {step.name}" for step in NORMALIZE]
    assert messages[0].endswith("(unchanged)")
    assert all(f"{len(graph.nodes)} nodes before, {len(graph.nodes)} after" in message for message in messages)


def test_a_plan_logs_its_verdicts_by_reason(caplog):
    with caplog.at_level(logging.DEBUG, logger="mhc_compile"):
        planned(lambda m, x: ((y := x + m.f(x)) + y) + y.relu())
    (message,) = lines(caplog.records, "plan: ")
    assert re.fullmatch(
        r"plan: \d sites in \d chains, \d additions rejected \(independent 1, same-value 1\), [\d.]+ ms", message
    )


def test_no_graph_is_printed_unless_a_trace_is_written(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a graph was printed")

    graph = fx.symbolic_trace(nn.Linear(2, 2)).graph
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest adds its own, which want the text
    monkeypatch.setattr(torch.fx.Graph, "python_code", fail)
    run_passes(graph, NORMALIZE)
