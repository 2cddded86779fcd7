"""`model_command`: arguments, target and output that the commands on one model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from rich.text import Text

from mhc_compile.cli.shared import ModelCall, model_command
from mhc_compile.reporting.base import Renderable, render

MODELS = """
import torch
from torch import nn

def noise():
    return nn.Identity(), (torch.rand(3),)
"""


@dataclass(frozen=True)
class Result(Renderable):
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}


@render.register(Result)
def render_result(result: Result, *, digits: int = 2) -> Text:
    return Text(" ".join(f"{value:.{digits}f}" for value in result.values))


@pytest.fixture
def target(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    return f"{tmp_path / 'models.py'}:noise"


def invoke(command: click.Command, *arguments: str):
    return CliRunner().invoke(command, arguments)


@model_command("measure", runs_model=True)
@click.option("--digits", type=int, default=2)
def measure(call: ModelCall, *, digits: int) -> None:
    loaded = call.loaded
    assert loaded.model.training is call.train
    with call.progress("measuring"):
        result = Result(tuple(loaded.model(*loaded.args).tolist()))
    call.show(result, digits=digits)


def test_a_result_is_text_or_json_and_the_seed_comes_before_the_factory(target):
    torch.manual_seed(7)
    expected = Result(tuple(torch.rand(3).tolist()))
    text = invoke(measure, target, "--seed", "7", "--digits", "3", "--eval")
    assert (text.exit_code, text.stdout) == (0, f"{render(expected, digits=3)}\n")
    data = invoke(measure, target, "--seed", "7", "--json")
    assert data.exit_code == 0
    assert '"values"' in data.stdout
    assert str(expected.values[0]) in data.stdout


def test_a_model_without_memory_is_refused_by_a_command_that_runs_it(target):
    done = invoke(measure, target, "--full-size")
    assert done.exit_code == 2
    assert "--full-size models have no memory without --weights FILE, and measure runs the model" in done.stderr


def test_wrong_usage_is_found_before_the_target_is_loaded():
    done = invoke(measure, "missing.py:model", "--streams", "99")
    assert done.exit_code == 2
    assert "option 'streams' is 99" in done.stderr


def test_command_with_optional_target_and_own_json_option():
    @model_command("bench", optional=True, json_flag=False)
    @click.option("--json", "json_file")
    def bench(call: ModelCall, *, json_file: str | None) -> None:
        click.echo(f"{call.target!r} {call.options} {json_file} {call.as_json} {call.seed}")

    done = invoke(bench, "--json", "file.json", "--streams", "2")
    assert done.stdout == "'' {'streams': 2} file.json False None\n"
    assert [one.name for one in bench.params][-3:] == ["json_file", "quiet", "debug"]
